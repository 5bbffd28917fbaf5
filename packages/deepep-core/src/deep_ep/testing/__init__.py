"""What the library's tests are made of, for the tests of backends that live elsewhere too. Needs ``[testing]``.

A backend's package tests itself in a few lines::

    # conftest.py
    pytest_plugins = ["deep_ep.testing.plugin"]

    # test_conformance.py
    from deep_ep.testing.conformance import NormalModeConformance

    class TestNormalMode(NormalModeConformance):
        backend = "mybackend"
        rank_counts = (1, 2, 4)

`routing` and `inputs` make cases, `oracle` says what has to come out, `numeric` compares, `strategies` generates cases
with hypothesis, `conformance` holds the suite, `plugin` the fixtures.
"""
