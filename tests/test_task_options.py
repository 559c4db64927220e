"""What a task may say about its lock, and what is refused when it is bound."""

from datetime import date, timedelta
from functools import wraps

import pytest
from celery import Celery, Task, _state, shared_task
from django.core.management import call_command
from pydantic import BaseModel

from celery_pglock import (
    ALL_ARGUMENTS,
    AdvisoryTask,
    LockMisuse,
    LockNotAcquired,
    Raise,
    Retry,
    Return,
    Skip,
    XactAdvisoryTask,
    advisory,
    lock_for,
)
from celery_pglock.checks import tasks_can_work
from tests.celery_app import app as our_app
from tests.models import Entry

EASTER = date(2026, 4, 5)


@pytest.fixture
def app(monkeypatch):
    # A shared task is one of every app that is finalized from then on, and so of other tests.
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))
    with Celery("options", set_as_current=False, broker="memory://", backend="cache+memory://") as app:
        yield app


def names(task, *args, **kwargs):
    return {key.name for key in task.lock_for(*args, **kwargs).keys}


class TestKeys:
    def test_the_default_is_the_tasks_name(self, app):
        @app.task(base=AdvisoryTask, name="billing.{close}")
        def close(month):
            pass

        assert close.lock_for(3) == advisory("billing.{close}", timeout=0)

    def test_a_template_renders_bound_arguments(self, app):
        @app.task(base=AdvisoryTask, lock_key="import:{account_id}:{{x}}:{when:%Y}")
        def load(account_id, when=EASTER, *, other=1):
            pass

        assert names(load, 1, date(2026, 1, 1)) == {"import:1:{x}:2026"}
        assert names(load, account_id="1", when=date(2026, 5, 5)) == {"import:1:{x}:2026"}

    def test_one_call_has_one_key_however_it_is_written(self, app):
        @app.task(base=AdvisoryTask, lock_by=("b", "a"), name="f")
        def f(a, b=2, c=3):
            pass

        assert names(f, 1) == names(f, a=1) == names(f, 1, b=2) == names(f, b=2, a=1, c=9) == {"f(a=1, b=2)"}
        assert names(f, "1") == {'f(a="1", b=2)'}

    def test_all_arguments_are_taken_when_asked_for(self, app):
        @app.task(base=AdvisoryTask, lock_by=ALL_ARGUMENTS, name="f", bind=True)
        def f(self, a, *rest, b=2, **more):
            pass

        assert names(f, 1, 5, 6, z=[1], y=None) == {"f(a=1, b=2, rest=[5, 6], y=None, z=[1])"}

    def test_lists_equal_tuples_as_after_the_broker(self, app):
        @app.task(base=AdvisoryTask, lock_by=("a",), name="f")
        def f(a):
            pass

        assert names(f, (1, 2)) == names(f, [1, 2])

    def test_a_model_instance_counts_by_label_and_primary_key(self, app):
        @app.task(base=AdvisoryTask, lock_by=("entry",), name="f")
        def f(entry):
            pass

        assert (
            names(f, Entry(pk=3, key="old"))
            == names(f, Entry(pk=3, key="new"))
            == {"f(entry=tests.Entry(3))"}
        )

    def test_a_callable_gets_the_calls_arguments_and_is_taken_literally(self, app):
        @app.task(base=AdvisoryTask, bind=True, lock_key=lambda a, *, b=2: f"{{a}}{a}{b}")
        def f(self, a, *, b=2):
            pass

        assert names(f, 1) == {"{a}12"}
        assert names(f, 1, b=3) == {"{a}13"}

    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            (7, advisory(7)),
            ((1, 2), advisory((1, 2))),
            ([1, 2], advisory(1, 2)),
            ((1, 2, 3), advisory(1, 2, 3)),
            (("a", "b"), advisory("a", "b")),
            (["x:{a}", (1, 2), 3], advisory("x:1", (1, 2), 3)),
        ],
    )
    def test_one_key_or_several(self, app, key, expected):
        @app.task(base=AdvisoryTask, lock_key=key)
        def stated(a=1):
            pass

        assert stated.lock_for().keys == expected.keys
        if "x:{a}" not in (key if isinstance(key, list) else ()):

            @app.task(base=AdvisoryTask, lock_key=lambda a=1: key)
            def computed(a=1):
                pass

            assert computed.lock_for().keys == expected.keys

    def test_a_callable_that_gives_no_key_is_refused(self, app):
        @app.task(base=AdvisoryTask, lock_key=list)
        def f():
            pass

        with pytest.raises(LockMisuse, match="no key at all"):
            f.lock_for()

    @pytest.mark.parametrize("options", [{"lock_by": ("a",)}, {"lock_key": "x:{a}"}])
    def test_an_unstable_value_is_refused_by_the_arguments_name(self, app, options):
        @app.task(base=AdvisoryTask, **options)
        def f(a):
            pass

        with pytest.raises(LockMisuse, match=r"The argument 'a' of .* holds a memory address"):
            f.lock_for(object())

    def test_an_unstable_text_of_a_callable_is_refused(self, app):
        @app.task(base=AdvisoryTask, lock_key=lambda a: f"x:{a}")
        def f(a):
            pass

        assert names(f, 1) == {"x:1"}
        with pytest.raises(LockMisuse, match="another one in every process"):
            f.lock_for(object())

    def test_a_format_that_does_not_fit_the_value_is_told_with_the_template(self, app):
        @app.task(base=AdvisoryTask, lock_key="{when:%Y}-{n:d}")
        def f(when, n):
            pass

        assert names(f, EASTER, 1) == {"2026-1"}
        with pytest.raises(LockMisuse, match="cannot be filled"):
            f.lock_for(EASTER, "1")

    def test_a_keyword_that_is_missing_is_told(self, app):
        @app.task(base=AdvisoryTask, lock_key="{tenant}")
        def f(**values):
            pass

        assert names(f, tenant="acme") == {"acme"}
        with pytest.raises(LockMisuse, match="'tenant', and it is missing"):
            f.lock_for()

    def test_defaults_are_part_of_the_key_where_a_call_gives_nothing(self, app):
        def by_keyword(*, a=1):
            pass

        def by_position(a=1, /):
            pass

        def with_others(a=1, *others):
            pass

        for function in (by_keyword, by_position):
            task = app.task(base=AdvisoryTask, lock_by=ALL_ARGUMENTS, name=function.__name__)(function)
            assert names(task) == {f"{function.__name__}(a=1)"}
        task = app.task(base=AdvisoryTask, lock_by=ALL_ARGUMENTS, name="f")(with_others)
        assert names(task) == {"f(a=1, others=[])"}

    def test_a_keyword_that_a_call_must_give_is_missed(self, app):
        @app.task(base=AdvisoryTask, lock_by=ALL_ARGUMENTS)
        def f(*, a):
            pass

        with pytest.raises(TypeError):
            f.lock_for()

    def test_wrong_arguments_are_the_calls_own_error(self, app):
        @app.task(base=AdvisoryTask, lock_key="{a}")
        def f(a):
            pass

        with pytest.raises(TypeError):
            f.lock_for(1, 2)

    def test_a_pydantic_task_is_keyed_by_what_the_message_holds(self, app):
        class Order(BaseModel):
            number: int

        @app.task(base=AdvisoryTask, pydantic=True, lock_by=("order",), name="f")
        def f(order: Order):
            pass

        assert names(f, Order(number=1)) == names(f, {"number": 1}) == {'f(order={"number": 1})'}

    def test_autoretry_and_wrappers_keep_the_signature(self, app):
        def wrapper(function):
            @wraps(function)
            def inner(*args, **kwargs):
                return function(*args, **kwargs)

            return inner

        @app.task(base=AdvisoryTask, lock_key="{a}", autoretry_for=(ValueError,))
        @wrapper
        def f(a):
            pass

        assert names(f, 5) == {"5"}

    def test_a_class_based_task(self, app):
        class Load(AdvisoryTask):
            name = "load"
            lock_key = "load:{a}"

            def run(self, a):
                pass

        assert names(app.register_task(Load()), 1) == {"load:1"}

    def test_a_shared_task(self, app):
        @shared_task(base=AdvisoryTask, lock_key="{a}", name="a.shared.task")
        def f(a):
            pass

        assert names(app.tasks["a.shared.task"], 1) == {"1"}

    def test_annotations_give_options(self, app):
        app.conf.task_annotations = {"annotated": {"lock_key": "from:{a}", "lock_timeout": 3}}

        @app.task(base=AdvisoryTask, name="annotated")
        def f(a):
            pass

        assert f.lock_for(1) == advisory("from:1", timeout=3)


class TestOptions:
    def test_every_option_reaches_the_lock(self, app):
        @app.task(
            base=AdvisoryTask,
            lock_key="k",
            lock_limit=3,
            lock_timeout=timedelta(seconds=2),
            lock_using="locks",
        )
        def limited():
            pass

        @app.task(base=AdvisoryTask, lock_key="k", lock_shared=True, lock_timeout=None)
        def shared():
            pass

        assert limited.lock_for() == advisory("k", limit=3, timeout=2, using="locks")
        assert shared.lock_for() == advisory("k", shared=True, timeout=None)

    def test_xact(self, app):
        @app.task(base=XactAdvisoryTask, lock_key="k")
        def by_class():
            pass

        @app.task(base=AdvisoryTask, lock_key="k", lock_xact=True)
        def by_option():
            pass

        assert by_class.lock_for() == by_option.lock_for() == advisory("k", xact=True, timeout=0)

    def test_settings_are_the_defaults(self, app, pglock_settings):
        @app.task(base=AdvisoryTask, lock_key="k")
        def f():
            pass

        pglock_settings(USING="locks", TIMEOUT=4, SIDE_EFFECT=Skip)
        assert f.lock_for() == advisory("k", using="locks", timeout=4)
        assert f.lock_options().effect() == Skip()

    def test_the_default_side_effect_is_retry(self, app):
        @app.task(base=AdvisoryTask)
        def f():
            pass

        assert f.lock_options().effect() == Retry()

    def test_a_limit_may_be_computed(self, app):
        @app.task(base=AdvisoryTask, lock_key="{a}", lock_limit=lambda a, most=2: most)
        def f(a, most=2):
            pass

        assert f.lock_for(1, most=5).limit == 5
        with pytest.raises(LockMisuse, match="lock_limit must be"):
            f.lock_for(1, most=0)

    def test_lock_for_asks_tasks_with_our_options_only(self, app):
        @app.task
        def plain():
            pass

        @app.task(base=AdvisoryTask)
        def ours():
            pass

        assert lock_for(ours) == ours.lock_for()
        with pytest.raises(LockMisuse, match="is not locked"):
            lock_for(plain)

    def test_a_lock_that_was_not_acquired_is_an_expected_outcome(self, app):
        @app.task(base=AdvisoryTask, throws=(KeyError,))
        def f():
            pass

        assert f.throws == (KeyError, LockNotAcquired)

        @app.task(base=AdvisoryTask, throws=KeyError)
        def single():
            pass

        assert single.throws == (KeyError, LockNotAcquired)

    def test_djangos_task_stays(self, app):
        @app.task(base=AdvisoryTask)
        def f():
            pass

        assert callable(f.delay_on_commit)

    def test_as_the_class_of_all_tasks_it_leaves_celerys_own_alone(self):
        with Celery("all", task_cls="celery_pglock:AdvisoryTask", set_as_current=False) as app:
            assert isinstance(app.tasks["celery.chord_unlock"], AdvisoryTask)
            assert app.tasks["celery.chord_unlock"].lock_options() is None

            @app.task
            def f():
                pass

            assert f.lock_for()


MISUSES = [
    ({"lock_kei": "x"}, "no option 'lock_kei'.*Did you mean 'lock_key'"),
    ({"lock_something": 1}, "prefix lock_ is reserved"),
    ({"lock_key": "x", "lock_by": ("a",)}, "use one of them"),
    ({"lock_key": "x:{acount}"}, "uses 'acount', which is not an argument of it.*Did you mean 'account'"),
    ({"lock_key": "{}"}, "must be the name of an argument"),
    ({"lock_key": "{0}"}, "must be the name of an argument"),
    ({"lock_key": "{account.pk}"}, "must be the name of an argument"),
    ({"lock_key": "{account[0]}"}, "must be the name of an argument"),
    ({"lock_key": "{account:{a}}"}, "fields inside of a field"),
    ({"lock_key": "{account"}, "cannot be used"),
    ({"lock_key": ""}, "is not a lock id"),
    ({"lock_key": 2**63}, "does not fit"),
    ({"lock_key": True}, "is not a lock id"),
    ({"lock_key": None}, "is not a lock id"),
    ({"lock_key": []}, "lock_key is empty"),
    ({"lock_by": "account"}, "tuple of parameter names"),
    ({"lock_by": ()}, "tuple of parameter names"),
    ({"lock_by": ("acount",)}, "names 'acount'.*Did you mean 'account'"),
    ({"lock_limit": 0}, "lock_limit must be"),
    ({"lock_limit": "3"}, "lock_limit must be"),
    ({"lock_limit": 2, "lock_shared": True}, "not both"),
    ({"lock_limit": lambda account, a: 1, "lock_shared": True}, "not both"),
    ({"lock_timeout": -1}, "lock_timeout must be"),
    ({"lock_timeout": "3"}, "lock_timeout must be"),
    ({"lock_timeout": 10, "soft_time_limit": 10}, "leaves nothing of soft_time_limit"),
    ({"lock_timeout": 10, "time_limit": 5}, "leaves nothing of time_limit"),
    ({"lock_side_effect": Return}, "would run the body without its lock"),
    ({"lock_side_effect": "Skip"}, "must be a side effect"),
    ({"lock_on_lost": "ignore"}, "lock_on_lost must be one of"),
    ({"lock_on_lost": "fail", "lock_xact": True}, "lock_on_lost is for session-level locks"),
    ({"lock_strict": "yes"}, "lock_strict must be True or False"),
    ({"lock_strict": True, "lock_xact": True}, "lock_strict is for session-level locks"),
    ({"lock_strict": True, "soft_time_limit": 19}, "leaves nothing of soft_time_limit"),
    ({"lock_strict": True, "lock_shared": True}, "does not go with lock_shared or lock_limit"),
    ({"lock_strict": True, "lock_limit": 2}, "does not go with lock_shared or lock_limit"),
    ({"lock_xact": "no"}, "lock_xact must be True or False"),
    ({"lock_shared": 1}, "lock_shared must be True or False"),
    ({"lock_on_direct_call": None}, "lock_on_direct_call must be True or False"),
    ({"lock_using": "lock"}, "not in DATABASES. Did you mean 'locks'"),
    ({"lock_priority": -1}, "lock_priority must be an int of 0 or more, not -1"),
    ({"lock_priority": True}, "lock_priority must be an int of 0 or more, not True"),
    ({"lock_priority": 2**31}, "lock_priority must be an int"),
]


@pytest.mark.parametrize(("options", "message"), MISUSES, ids=[", ".join(options) for options, _ in MISUSES])
def test_what_cannot_work_is_refused_when_the_task_is_bound(app, options, message):
    @app.task(base=AdvisoryTask, **options)
    def task(account, a=1):
        pass

    with pytest.raises(LockMisuse, match=message) as refused:
        app.finalize()
    assert "test_task_options.task" in str(refused.value)
    with pytest.raises(LockMisuse, match=message):
        task.apply(["it", "is", "not", "run", "unlocked"], throw=True)


def test_manage_check_binds_the_tasks(app, monkeypatch, django_db_blocker):
    # Tasks are shared with all apps that are finalized later.
    our_app.finalize()
    monkeypatch.setattr("celery_pglock.checks.current_app", our_app)

    @app.task(base=AdvisoryTask, lock_kei="x", name="broken")
    def broken():
        pass

    # Since 6.1 Django asks SQLite what it can, and pytest-django would not let it.
    with django_db_blocker.unblock():
        call_command("check")
    monkeypatch.setattr("celery_pglock.checks.current_app", app)
    (message,) = tasks_can_work()
    assert message.id == "celery_pglock.E002"
    assert "lock_kei" in message.msg


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"countdown": None}, "countdown"),
        ({"countdown": -1}, "countdown"),
        ({"maximum": None}, "maximum"),
        ({"backoff": 0.5}, "backoff"),
        ({"max_retries": -1}, "max_retries"),
        ({"deadline": -1}, "deadline"),
        ({"then": Retry()}, "when retrying is over"),
        ({"then": Return}, "when retrying is over"),
        ({"then": 3}, "must be a side effect"),
    ],
)
def test_retry_refuses_what_cannot_work(options, message):
    with pytest.raises(LockMisuse, match=message):
        Retry(**options)


def test_skip_refuses_what_cannot_work():
    with pytest.raises(LockMisuse, match='"continue" or "stop"'):
        Skip(chain="break")


class TestRetryDelays:
    def test_they_grow_up_to_the_maximum(self):
        retry = Retry(countdown=1, maximum=10, backoff=3, jitter=False)
        assert [retry.delay(attempt) for attempt in (1, 2, 3, 4, 5000)] == [1, 3, 9, 10, 10]

    def test_jitter_takes_up_to_a_half(self):
        delays = {Retry(countdown=10).delay(1) for _ in range(200)}
        assert len(delays) > 100
        assert 5 <= min(delays) < 6
        assert 9 < max(delays) <= 10

    def test_side_effects_are_values(self):
        assert Retry(countdown=2) == Retry(countdown=2) != Retry(countdown=3)
        assert Raise() == Raise()
        assert Skip("a") != Skip("b")


def test_a_task_that_defines_its_own_call_still_runs_through_it(app):
    class Noting(Task):
        abstract = True

        def __call__(self, *args, **kwargs):
            return ["noted", self.run(*args, **kwargs)]

    class Both(AdvisoryTask, Noting):
        abstract = True

    @app.task(base=Both)
    def f():
        return "body"

    assert f() == ["noted", "body"]
