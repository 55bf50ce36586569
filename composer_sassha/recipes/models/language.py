"""transformers' models: a pretrained encoder that classifies texts, and a GPT-2 of any size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from composer.metrics import BinaryF1Score, LanguageCrossEntropy, LanguagePerplexity
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import MulticlassAccuracy

from composer_sassha.recipes.hub import pretrained
from composer_sassha.recipes.schema import at_least, checked, within

Loss = Callable[[Tensor, Tensor], Tensor]


class LabelledTexts(ComposerModel):
    """One of transformers' networks, with a loss and metrics of its own, on batches with `labels`.

    A batch is a mapping of the network's arguments, and `labels`: one for each of its logits' vectors.

    Args:
        network: from transformers; its outputs have `logits`.
        loss: of logits [..., outputs] and labels [...]; of predictions [...] where there is one output.
        metrics: of an evaluation; they take logits and labels as well.
    """

    def __init__(self, network: nn.Module, loss: Loss, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self.network = network
        self.metrics = {type(metric).__name__: metric for metric in metrics}
        self._loss = loss

    def forward(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the outputs of the network, which has no use for the labels."""
        if not isinstance(batch, Mapping):
            raise ValueError("it takes texts, such as those of data.name=glue or data.name=text")
        return self.network(**{name: value for name, value in batch.items() if name != "labels"})

    def loss(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of the outputs."""
        return self._loss(_predicted(outputs), batch["labels"])

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Return the metrics by name."""
        return {} if is_train else self.metrics

    def update_metric(
        self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor], metric: Metric
    ) -> None:
        """Add a batch to a metric."""
        metric.update(_predicted(outputs), batch["labels"])


def _predicted(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits; those of a regression, which has one output, without a dimension for it."""
    logits = outputs["logits"]
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over all labels, of any shape; the logits have one more dimension at their end."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@dataclass
class TextClassifier:
    """An encoder of transformers with a classifier on top, by default SqueezeBERT (Iandola et al. 2020).

    Parts that the pretrained files do not have begin at random, such as the classifier of an encoder. One
    that they have, of a model that was fine-tuned before, is kept, and has to have as many outputs.

    Args:
        pretrained: a name on the Hugging Face hub, or a folder with what is there; None: SqueezeBERT's
            published size, not trained yet.
        outputs: classes, >= 2, or 1 for a regression, whose loss is the squared error.
    """

    pretrained: str | None = "squeezebert/squeezebert-uncased"
    outputs: int = checked(2, at_least(1))

    def build(self) -> ComposerModel:
        """Return the model.

        Raises:
            ValueError: the pretrained files cannot be loaded.
        """
        from transformers import AutoModelForSequenceClassification, SqueezeBertConfig

        if self.pretrained is None:
            config = SqueezeBertConfig(num_labels=self.outputs)
            network = AutoModelForSequenceClassification.from_config(config)
        else:
            load = AutoModelForSequenceClassification.from_pretrained
            network = pretrained(load, "pretrained", self.pretrained, num_labels=self.outputs)
        if self.outputs == 1:
            return LabelledTexts(
                network, F.mse_loss, [MeanSquaredError(), PearsonCorrCoef(), SpearmanCorrCoef()]
            )
        metrics = [LanguageCrossEntropy(), MulticlassAccuracy(self.outputs, average="micro")]
        if self.outputs == 2:
            metrics.append(BinaryF1Score())
        return LabelledTexts(network, cross_entropy, metrics)


@dataclass
class GPT:
    """GPT-2 (Radford et al. 2019) of any size, not trained yet; by default the smallest published one.

    Args:
        layers: number of blocks, >= 1.
        heads: of the attention, >= 1; their number divides `width`.
        width: of the residual stream, >= 1.
        context: tokens that it can take, >= 1.
        vocab_size: of the data, >= 2.
        dropout: of embeddings, attention and blocks, in [0, 1).
    """

    layers: int = checked(12, at_least(1))
    heads: int = checked(12, at_least(1))
    width: int = checked(768, at_least(1))
    context: int = checked(1024, at_least(1))
    vocab_size: int = checked(50257, at_least(2))
    dropout: float = checked(0.1, within(0, 1))

    def build(self) -> ComposerModel:
        """Return the model.

        Raises:
            ValueError: `heads` does not divide `width`.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        config = GPT2Config(
            vocab_size=self.vocab_size,
            n_positions=self.context,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            resid_pdrop=self.dropout,
            bos_token_id=None,  # the published one may lie beyond this vocabulary
            eos_token_id=None,
            use_cache=False,
        )
        return LabelledTexts(
            GPT2LMHeadModel(config), cross_entropy, [LanguageCrossEntropy(), LanguagePerplexity()]
        )
