"""The shop as it opens in the morning."""

from __future__ import annotations

import secrets

from django.apps import apps
from django.contrib.auth.models import User

from example_project.shop.models import Account, Customer, Supplier

MANAGER = "manager"
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


def open_office() -> str:
    """Let the manager into the admin by a new password, and give it."""
    password = secrets.token_urlsafe(6)
    manager, _ = User.objects.get_or_create(
        username=MANAGER, defaults={"is_staff": True, "is_superuser": True}
    )
    manager.set_password(password)
    manager.save()
    return password
