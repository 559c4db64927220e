"""The table whose rows only the newest holder may change."""

from django.db import models


class Ledger(models.Model):
    """One row a key, with the token of whoever wrote it last."""

    key = models.CharField(max_length=50, unique=True)
    timeline = models.BigIntegerField(default=0)
    number = models.BigIntegerField(default=0)
    writes = models.BigIntegerField(default=0)
