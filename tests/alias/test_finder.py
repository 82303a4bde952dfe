import copy
import importlib
import importlib.util
import pickle
import sys

import pytest
from packaging.version import Version

import ipex_quant
from ipex_quant.alias import IPEX, install_as_ipex, uninstall_as_ipex


@pytest.fixture
def ipex():
    install_as_ipex()
    yield importlib.import_module(IPEX)
    uninstall_as_ipex()


def test_nothing_is_installed_without_being_asked():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(IPEX)
    assert importlib.util.find_spec(IPEX) is None


def test_installing_twice_is_installing_once():
    before = list(sys.meta_path)
    install_as_ipex()
    install_as_ipex()
    assert len(sys.meta_path) == len(before) + 1
    uninstall_as_ipex()
    uninstall_as_ipex()
    assert sys.meta_path == before
    assert not [name for name in sys.modules if name.startswith(IPEX)]


def test_a_real_ipex_that_is_imported_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, IPEX, sys)
    with pytest.raises(RuntimeError, match="imported already"):
        install_as_ipex()


def test_names_are_this_packages(ipex):
    assert ipex.quantization.prepare is ipex_quant.quantization.prepare
    assert ipex.llm.modules.RMSNorm is ipex_quant.llm.modules.RMSNorm
    assert ipex.nn.modules.weight_only_quantization.WoqWeightFormat is ipex_quant.nn.WoqWeightFormat
    assert ipex.version is ipex.show_config is ipex_quant.show_config


@pytest.mark.parametrize(
    "statement",
    [
        "import intel_extension_for_pytorch as found",
        "import intel_extension_for_pytorch.quantization as found",
        "import intel_extension_for_pytorch._C as found",
        "from intel_extension_for_pytorch import quantization as found",
        "from intel_extension_for_pytorch.quantization import prepare as found",
        "from intel_extension_for_pytorch.quantization._quantize_utils import quantize_per_channel as found",
        "from intel_extension_for_pytorch.nn.modules.weight_only_quantization import WoqWeightFormat as found",
        "from intel_extension_for_pytorch.quantization import *; found = convert",
    ],
)
def test_every_form_of_import(ipex, statement):
    names = {}
    exec(statement, names)
    assert names["found"]


def test_modules_are_the_same_however_they_are_reached(ipex):
    assert ipex.quantization is sys.modules[f"{IPEX}.quantization"]
    assert ipex.llm.functional.fusions is importlib.import_module(f"{IPEX}.llm.functional.fusions")
    assert ipex.nn.utils.__name__ == f"{IPEX}.nn.utils"


def test_this_package_is_as_before(ipex):
    names = set(vars(ipex_quant.nn.modules))
    assert ipex.nn.modules.weight_only_quantization
    assert set(vars(ipex_quant.nn.modules)) == names
    assert ipex_quant.quantization.__name__ == ipex_quant.quantization.__spec__.name == "ipex_quant.quantization"


def test_the_version_compares_as_ipex_users_compare_it(ipex):
    assert Version(ipex.__version__) >= Version("2.1")
    assert Version(ipex.__version__.split("+")[0]).release == (2, 8, 0)
    assert ipex.__version__ >= "2.1.100"
    assert [int(part) for part in ipex.__version__.split(".")[:2]] == [2, 8]
    assert importlib.import_module(f"{IPEX}._version").__version__ == ipex.__version__
    assert ipex_quant.__version__ != ipex.__version__


def test_what_is_not_carried_says_what_to_use(ipex):
    with pytest.raises(AttributeError, match=r"amp is not in ipex_quant: use torch\.autocast"):
        ipex.amp  # noqa: B018
    for statement in ("from intel_extension_for_pytorch import amp", "import intel_extension_for_pytorch.amp"):
        with pytest.raises(ImportError, match=r"use torch\.autocast"):
            exec(statement)


def test_what_nobody_had_is_not_there(ipex):
    with pytest.raises(AttributeError, match=f"module '{IPEX}' has no attribute 'nonsense'"):
        ipex.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        exec("from intel_extension_for_pytorch import nonsense")
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        exec("import intel_extension_for_pytorch.quantization.nonsense")
    assert importlib.util.find_spec(f"{IPEX}.nonsense") is None
    assert not hasattr(ipex, "__wrapped__")


def test_names_can_be_listed(ipex):
    assert {"quantization", "llm", "nn", "utils", "_C", "__version__"} <= set(dir(ipex))
    assert "prepare" in dir(ipex.quantization)
    assert "weight_only_quantization" in dir(ipex.nn.modules)


def test_objects_pickle_without_the_alias(ipex):
    kind = ipex.quantization.WoqWeightDtype.INT4
    assert copy.deepcopy(kind) is kind
    assert IPEX.encode() not in pickle.dumps(kind)
