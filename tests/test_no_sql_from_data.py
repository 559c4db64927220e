"""SQL is put together from constants: data goes as parameters, or is refused."""

import ast
import os
import string
from pathlib import Path

import pytest
from django.core.exceptions import FieldError
from django.db import DatabaseError, connection, models
from django.test.utils import isolate_apps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import celery_pglock
from celery_pglock import LockMisuse, advisory, labels
from celery_pglock.models import BlockedPGLock, PGActivity, PGLock

PACKAGE = Path(celery_pglock.__file__).parent
# Functions that send their first argument.
SENDS = {"execute": 0, "ask": 0, "rows": 0, "send_query_params": 0}
PARTS_OF_STATEMENTS = {"select", "opening", "source", "_sql"}
# What a function is given and sends: whoever gives it is looked at, or has quoted or checked it.
GIVEN = {"sql", "label", "act", "tables", "table", "mode"}
WRITE_CONSTANTS = {
    "quote_name",
    "comment",
    "_label",
    "_labelled",
    "_numbered",
    "encode",
    "len",
    "reversed",
    "values",
}

# More of them take longer: `EXAMPLES=5000 make test ARGS='-k no_sql'`.
EXAMPLES = int(os.environ.get("EXAMPLES", "150"))
PROFILE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
TEXTS = st.one_of(
    st.text(st.characters() | st.sampled_from("'\"%/*\\;\x00🔒\ud800(){}_$:"), max_size=30),
    st.sampled_from(
        ["/*", "*/", "%s", "%(x)s", "'; SELECT 1 --", "\x00", "🔒" * 2500, "x" * 10_000, "\ud800", "\\"]
    ),
)


def functions():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path.relative_to(PACKAGE), node


def position_of_sql(function):
    names = [argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")]
    return names.index("sql") if "sql" in names else None


def name_of(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def sent():
    """Every text that is sent or passed on as ``sql``, with the function in which that happens."""
    positions = {
        function.name: position
        for _, function in functions()
        if (position := position_of_sql(function)) is not None
    } | SENDS
    for path, function in functions():
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or (name_of(call) in SENDS and isinstance(call.func, ast.Name)):
                continue
            if name_of(call) in positions:
                position = positions[name_of(call)]
                yield path, function, call.args[position] if len(call.args) > position else call


def is_constant(node, function):
    def are_constant(nodes):
        return all(is_constant(one, function) for one in nodes)

    match node:
        case ast.Constant():
            return True
        case ast.JoinedStr(values=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts):
            return are_constant(parts)
        case ast.FormattedValue(value=part) | ast.Starred(value=part):
            return is_constant(part, function)
        case ast.BinOp(left=left, right=right) | ast.IfExp(body=left, orelse=right):
            return are_constant([left, right])
        case ast.ListComp(elt=part):
            return is_constant(part, function)
        case ast.Attribute(attr=name):
            return name.isupper() or name in PARTS_OF_STATEMENTS
        case ast.Call(func=ast.Attribute(attr="format" | "join", value=text), args=args, keywords=keywords):
            return are_constant([text, *args, *(keyword.value for keyword in keywords)])
        case ast.Call():
            return name_of(node) in WRITE_CONSTANTS
        case ast.Name(id=name):
            return name.isupper() or is_local_constant(name, function)
    return False


def is_local_constant(name, function):
    values = []
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                values.append(value)
            case ast.For(target=ast.Name(id=target), iter=value) if target == name:
                values.append(value)
    return all(is_constant(value, function) for value in values) if values else name in GIVEN


def test_what_is_sent_is_put_together_from_constants():
    """The first argument of every ``execute``, ``ask`` and ``rows``, and what is passed on as ``sql``,
    consists of literals, names in capitals, parts of a ``Statement``, labels (percent-encoded),
    ``quote_name(...)``, and of local names for nothing else.
    """
    found = list(sent())
    assert len({path for path, *_ in found}) > 5
    offences = [f"{path}:{text.lineno}" for path, function, text in found if not is_constant(text, function)]
    assert not offences


@pytest.mark.parametrize(
    "body",
    [
        "cursor.execute(f'SELECT {pid}')",
        "cursor.execute('SELECT ' + pid)",
        "cursor.execute('SELECT %s' % pid)",
        "cursor.execute('SELECT {pid}'.format(pid=pid))",
        "text = pid; cursor.execute(text)",
    ],
)
def test_data_would_be_found(body):
    function = ast.parse(f"def look(cursor, pid):\n    {body}").body[0]
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and name_of(node) == "execute"]
    assert not is_constant(calls[0].args[0], function)


@pytest.fixture
def still_works(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock():

        def asks():
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
                assert cursor.fetchone() == (1,)

        yield asks
        connection.close()


def is_refused_or(works, *errors):
    try:
        return works()
    except (LockMisuse, *errors):
        return None


@pytest.mark.django_db(transaction=True)
class TestFuzz:
    def test_pids(self, still_works):
        @PROFILE
        @given(TEXTS | st.integers() | st.text(string.digits + " +-_.e", max_size=12))
        def fuzz(pid):
            found = is_refused_or(lambda: list(PGLock.objects.pid(pid)))
            assert found is None or str(pid).isdigit()
            still_works()

        fuzz()

    def test_filters(self, still_works):
        names = [field.name for field in PGLock._meta.get_fields()]
        lookups = st.tuples(
            st.sampled_from(names), st.sampled_from(["", "__in", "__contains", "__gt", "__isnull"])
        )

        @PROFILE
        @given(lookups.map("".join) | TEXTS, TEXTS)
        def fuzz(lookup, value):
            is_refused_or(
                lambda: list(PGLock.objects.config(None, filters=[f"{lookup}={value}"])[:1]),
                DatabaseError,
                UnicodeEncodeError,
            )
            still_works()

        fuzz()

    def test_names_in_labels(self, still_works):
        @PROFILE
        @given(
            TEXTS, st.sampled_from(["", "contains", "icontains", "startswith", "endswith", "iexact", "in"])
        )
        def fuzz(text, lookup):
            name = f"name__{lookup}".removesuffix("__")
            is_refused_or(
                lambda: list(BlockedPGLock.objects.filter(**{name: [text] if lookup == "in" else text}))
            )
            still_works()

        fuzz()

    def test_locks_are_found_by_any_name(self, still_works):
        @settings(PROFILE, max_examples=max(30, EXAMPLES // 5))
        @given(TEXTS.filter(bool))
        def fuzz(name):
            with advisory(name):
                found = PGLock.objects.get(type="ADVISORY", activity__application_name="pglock")
                assert found.name == labels.decoded(labels.encoded(name))
                if found.name == name:
                    assert PGLock.objects.filter(name=name, name__contains=name[-3:]).count() == 1

        fuzz()

    def test_tables(self, still_works):
        @settings(PROFILE, max_examples=max(30, EXAMPLES // 3))
        @given(TEXTS.filter(bool))
        def fuzz(table):
            with isolate_apps("tests"):
                meta = type("Meta", (), {"app_label": "tests", "db_table": table})
                model = type("Fuzzed", (models.Model,), {"__module__": "tests.models", "Meta": meta})
                assert not is_refused_or(
                    lambda: list(PGLock.objects.on(model)), DatabaseError, UnicodeEncodeError
                )
            still_works()

        fuzz()

    def test_backends(self, still_works):
        @settings(PROFILE, max_examples=max(30, EXAMPLES // 3))
        @given(st.sampled_from(["query", "application_name", "state", "duration"]), TEXTS)
        def fuzz(name, value):
            is_refused_or(
                lambda: list(PGActivity.objects.filter(**{name: value})),
                DatabaseError, UnicodeEncodeError, FieldError,
            )  # fmt: skip
            still_works()

        fuzz()
