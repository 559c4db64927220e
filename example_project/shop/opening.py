"""The shop as it opens in the morning."""

from __future__ import annotations

from django.apps import apps

from example_project.shop.models import Account, Customer, Supplier

ACCOUNTS = ("till", "safe", "bank")
SUPPLIERS = ("acme", "globex", "initech")
CUSTOMERS = {"ada": "12 St James's Square", "grace": "1 Navy Yard", "edsger": "5 Plataanstraat", "alan": ""}


def open_shop() -> None:
    """Clear what an earlier run left in the shop's tables, and fill the shelves."""
    for model in apps.get_app_config("pglock_example").get_models():
        model.objects.all().delete()
    Account.objects.bulk_create(Account(name=name, opening_balance=1000, balance=1000) for name in ACCOUNTS)
    Supplier.objects.bulk_create(Supplier(name=name) for name in SUPPLIERS)
    Customer.objects.bulk_create(Customer(name=name, address=address) for name, address in CUSTOMERS.items())
