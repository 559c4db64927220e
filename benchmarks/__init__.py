"""What locks cost, measured beside what others cost, in one run.

    python -m benchmarks [--quick] [--only locks,tasks] [--postgresql 16|18]

A measurement is a module with one function, listed in ``__main__``::

    def measure(scale: Scale) -> list[Table]: ...

``scale`` tells how long it may take, and which servers to use; the tables (``tables``) are printed by
``report``, and written to the docs. What is compared is interleaved by ``rounds``, each contender in a
process of its own (``contenders``). A server with settings of its own comes from ``servers.postgresql``.
"""
