"""Replaced attributes, in contexts that threads enter and leave in any order."""

import pytest

from composer_sassha.common.replaced import replaced


class Owner:
    inherited = 1.0


class Heir(Owner):
    own = 1.0


@pytest.mark.parametrize("name", ["own", "inherited"])
def test_contexts_that_overlap_leave_the_attribute_as_it_was(name):
    before = dict(vars(Heir))
    twice, thrice = (replaced([(Heir, name, lambda old, n=n: n * old)]) for n in (2, 3))
    twice.__enter__()
    thrice.__enter__()
    assert getattr(Heir, name) == 6
    twice.__exit__(None, None, None)
    assert getattr(Heir, name) == 3
    thrice.__exit__(None, None, None)
    assert dict(vars(Heir)) == before


def test_a_replacement_that_fails_leaves_the_others_as_they_were():
    places = [(Heir, "own", lambda _: 0.0), (Owner, "inherited", lambda _: 1 / 0)]
    with pytest.raises(ZeroDivisionError), replaced(places):
        raise AssertionError("is not reached")
    assert Heir.own == Owner.inherited == 1
