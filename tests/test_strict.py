"""Strict locks: fencing tokens, and the delay after a holder that did not leave in order."""

import pytest

from celery_pglock import advisory
from celery_pglock.models import KeyState


def strict(*ids, **options):
    return advisory(*ids, **options).strictly()


class TestTokens:
    @pytest.mark.parametrize("timeout", [0, 5, None])
    def test_a_later_holder_has_a_higher_one(self, rival, timeout):
        tokens = []
        for _ in range(3):
            hold = strict("k", timeout=timeout).take()
            tokens.append(hold.token)
            hold.give_back()
        assert tokens == sorted(set(tokens))
        assert KeyState.objects.get().is_clean
