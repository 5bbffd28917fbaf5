"""How frameworks find out which version of the library they have, without calling it."""

from __future__ import annotations

import importlib.util
import inspect

import pytest

import deep_ep
from deep_ep import Buffer, Config


def test_feature_tests_of_clients_find_version_1():
    assert importlib.util.find_spec("deep_ep") is not None
    assert not hasattr(deep_ep, "ElasticBuffer"), "vLLM, SGLang and torchtitan would switch to another interface"
    with pytest.raises(ImportError):
        from deep_ep import HybridEPBuffer  # noqa: F401
    for function in (Buffer.dispatch, Buffer.low_latency_dispatch):
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds, "read as 'supports everything'"
    annotation = deep_ep.Config | None
    assert isinstance(Config(), annotation)


@pytest.mark.parametrize("extra", ["use_nvfp4", "x_global_scale", "use_mxfp4", "quant_mode", "overlap", "block_m"])
def test_keywords_of_forks_are_type_errors(extra):
    for function in (Buffer.dispatch, Buffer.combine, Buffer.low_latency_dispatch, Buffer.low_latency_combine):
        with pytest.raises(TypeError, match=extra):
            function(None, None, None, None, None, **{extra: 1})


def test_class_attribute_follows_the_setter():
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(32)
        assert Buffer.num_sms == 32
    finally:
        Buffer.set_num_sms(before)
