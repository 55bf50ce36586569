"""The algorithms a recipe can name, each with the arguments of its constructor."""

from composer.algorithms import GradientClipping, LabelSmoothing

from composer_sassha import algorithms
from composer_sassha.recipes.schema import arguments_of

ALGORITHMS: dict[str, type] = {
    "sam": arguments_of(algorithms.SAM),
    "asam": arguments_of(algorithms.ASAM),
    "gsam": arguments_of(algorithms.GSAM),
    "ssam": arguments_of(algorithms.SSAM),
    "usam": arguments_of(algorithms.USAM),
    "looksam": arguments_of(algorithms.LookSAM),
    "esam": arguments_of(algorithms.ESAM),
    "msam": arguments_of(algorithms.MSAM),
    "lazy_hessian": arguments_of(algorithms.LazyHessian),
    "sassha": arguments_of(algorithms.Sassha),
    "msassha": arguments_of(algorithms.MSassha),
    # Composer's
    "gradient_clipping": arguments_of(GradientClipping),
    "label_smoothing": arguments_of(LabelSmoothing, without=["target_key"]),
}
