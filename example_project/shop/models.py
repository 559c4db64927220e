"""What the shop keeps, and the journal of what its tasks did."""

from __future__ import annotations

from django.db import models


class ClockTimestamp(models.Func):
    """The time of the statement by the database's clock, not of its transaction."""

    function = "clock_timestamp"
    output_field = models.DateTimeField()


class Account(models.Model):
    name = models.TextField(unique=True)
    opening_balance = models.IntegerField()
    balance = models.IntegerField()


class Transfer(models.Model):
    source = models.ForeignKey(Account, models.CASCADE, related_name="sent")
    target = models.ForeignKey(Account, models.CASCADE, related_name="received")
    amount = models.IntegerField()


class Supplier(models.Model):
    name = models.TextField(unique=True)
    products = models.IntegerField(default=0)


class Import(models.Model):
    supplier = models.ForeignKey(Supplier, models.CASCADE, related_name="imports")
    products = models.IntegerField()


class Product(models.Model):
    warehouse = models.TextField()


class Analysis(models.Model):
    products_before = models.IntegerField()
    products_after = models.IntegerField()


class Customer(models.Model):
    name = models.TextField(unique=True)
    address = models.TextField(blank=True)


class Invoice(models.Model):
    # Not unique, so that a number given out twice is found by the example, not by the database.
    number = models.IntegerField()
    customer = models.ForeignKey(Customer, models.CASCADE)


class Report(models.Model):
    invoices = models.IntegerField()


class Booking(models.Model):
    """What a reconciliation writes; each writes as many, or none."""


class Closing(models.Model):
    bookings_before = models.IntegerField()
    bookings_after = models.IntegerField()


class Entry(models.Model):
    """One thing that happened to one task; rows are only ever added.

    Their ids are in the order in which things happened: each is drawn while the lock is held.
    """

    at = models.DateTimeField(db_default=ClockTimestamp())
    what = models.TextField()
    task = models.TextField()
    task_id = models.TextField()
    args = models.JSONField(default=list)
    worker = models.TextField()
    resource = models.TextField()
    lock = models.TextField()
    seconds = models.FloatField(default=0)
    remark = models.TextField()

    def __str__(self) -> str:
        return f"{self.task}({', '.join(map(str, self.args))})" if self.task_id else self.task
