"""The house's rules, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each package may import itself and what stands before it.
ORDER = ["core", "kernels", "kv_transfer", "eplb", "engine", ("prefill", "decode"), "cluster"]
OUTSIDE = {"bench", "deploy", "tests"}


def rank(package: str) -> int:
    for position, name in enumerate(ORDER):
        if package == name or (isinstance(name, tuple) and package in name):
            return position
    raise AssertionError(f"{package} has no place in ORDER")


def sources() -> list[Path]:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in tracked if (ROOT / name).is_file()]


def product_sources() -> list[Path]:
    return [path for path in sources() if path.relative_to(ROOT).parts[0] != "tests"]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name, relative ones resolved from the root: "core.errors", "ray"."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])
            else:
                yield node.lineno, node.module or ""


def test_imports_run_one_way() -> None:
    packages = {name for entry in ORDER for name in (entry if isinstance(entry, tuple) else (entry,))}
    wrong = []
    for path in product_sources():
        parts = path.relative_to(ROOT).parts
        if parts[0] not in packages:
            continue
        for line, name in imports(path):
            target = name.split(".")[0]
            if target in OUTSIDE and parts[0] != "cluster":
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
            if target in packages and target != parts[0] and rank(target) >= rank(parts[0]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}, which stands above {parts[0]}")
    assert not wrong, "\n".join(wrong)


def test_the_package_is_imported_relatively() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in product_sources()
        for line, name in imports(path)
        if name.split(".")[0] == "tandem"
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("module", "homes"),
    [
        (
            "ray",
            {
                f"cluster/{name}.py"
                for name in (
                    "actors",
                    "estate",
                    "keeper",
                    "node_actors",
                    "placement_groups",
                    "probe_actors",
                    "ray_cluster",
                    "ray_errors",
                    "ray_launcher",
                    "tandem_cluster",
                )
            },
        )
    ],
)
def test_a_library_has_its_home(module: str, homes: set[str]) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in product_sources()
        for _, name in imports(path)
        if name.split(".")[0] == module
    }
    assert found == homes


def test_core_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, pkgutil, importlib, tandem.core as core\n"
        "for module in pkgutil.iter_modules(core.__path__): importlib.import_module(f'tandem.core.{module.name}')\n"
        "print([name for name in ('torch', 'ray', 'numba', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("module", ["gateway.runtime", "cli.app", "cli.cluster", "cli.serve", "actors"])
def test_what_only_looks_and_passes_on_imports_no_torch(module: str) -> None:
    code = f"import sys, tandem.cluster.{module}; print([name for name in ('torch', 'numba') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def _calls(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.lineno, f"{getattr(node.value, 'id', getattr(node.value, 'attr', ''))}.{node.attr}"


def test_nothing_is_unpickled() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle", "multiprocessing"}
    # Their pipes lead to processes that they started themselves.
    own_children = {ROOT / "bench" / "kv.py", ROOT / "bench" / "gateway.py"}
    wrong = []
    for path in product_sources():
        here = forbidden - {"multiprocessing"} if path in own_children else forbidden
        wrong += [f"{path}:{line} {name}" for line, name in imports(path) if name.split(".")[0] in here]
        wrong += [
            f"{path}:{line} {name}"
            for line, name in _calls(path)
            if name in ("torch.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load", "np.fromfile")
            # torch.distributed pickles whatever is no tensor.
            or name.endswith((".recv_pyobj", ".recv_serialized", ".read_pickle", "gather_object", "_object_list"))
        ]
    # The training script reads back the arrays that it wrote itself, and forbids pickles in them.
    wrong = [entry for entry in wrong if "demo-model/train.py" not in entry]
    assert not wrong, "\n".join(wrong)


def test_what_the_training_script_reads_back_is_no_pickle() -> None:
    path = ROOT / "deploy" / "demo-model" / "train.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    loads = [call for call in calls if getattr(call.func, "attr", "") == "load"]
    assert loads
    for call in loads:
        allowed = [keyword.value for keyword in call.keywords if keyword.arg == "allow_pickle"]
        assert all(isinstance(value, ast.Constant) and value.value is False for value in allowed)  # the default too


def test_no_text_is_run() -> None:
    """Neither as Python nor by a shell."""
    wrong = []
    for path in product_sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", "")
            if name in ("eval", "exec", "compile", "__import__"):
                wrong.append(f"{path}:{node.lineno} {name}")
            if any(keyword.arg == "shell" for keyword in node.keywords):
                wrong.append(f"{path}:{node.lineno} shell")
        wrong += [f"{path}:{line} {name}" for line, name in _calls(path) if name in ("os.system", "os.popen")]
    assert not wrong, "\n".join(wrong)


def test_sockets_of_zmq_are_made_in_one_place() -> None:
    """`core/wire.py` encrypts, authenticates and bounds every socket that it makes; bare ones are for measuring alone."""
    wrong = []
    for path in product_sources():
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            made = ast.unparse(node.func)
            kinds = [ast.unparse(argument) for argument in node.args]
            sockets = made.endswith(".socket") and any(kind.startswith("zmq.") for kind in kinds)
            sockets |= made.startswith("zmq.") and made.endswith(("Context", "Context.instance", "Socket"))
            if sockets and name != "core/wire.py":
                wrong.append(f"{name}:{node.lineno} {made}")
            bare = any(keyword.arg == "encrypt" for keyword in node.keywords)
            if bare and made.endswith("SecureContext") and path.relative_to(ROOT).parts[0] != "bench":
                wrong.append(f"{name}:{node.lineno} {made} without encryption")
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_in_one_place() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in product_sources()
        for line, name in _calls(path)
        if name in ("os.environ", "os.getenv", "os.putenv") and path != ROOT / "core" / "environment.py"
    ]
    assert not wrong, wrong


def test_nobody_listens_on_every_address() -> None:
    for path in product_sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "0.0.0.0" not in node.value, f"{path}:{node.lineno}"
                assert "tcp://*" not in node.value, f"{path}:{node.lineno}"


def test_public_things_are_documented() -> None:
    """Modules, classes and functions; what a documented Protocol declares is documented there."""
    wrong = []
    for path in product_sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            wrong.append(f"{path.relative_to(ROOT)}: no module docstring")
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node) and not _is_section(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert not wrong, "\n".join(wrong)


def _is_section(node: ast.AST) -> bool:
    """A configuration section or a request body, whose fields say it all."""
    return isinstance(node, ast.ClassDef) and any(
        getattr(base, "id", "") in ("Section", "_Tls", "_Body", "_Pool", "DecodePool") for base in node.bases
    )


def test_the_package_list_is_the_tree() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(["tandem", *path.relative_to(ROOT).parts[:-1]])
        for path in product_sources()
        if path.name == "__init__.py"
    }
    assert declared == found


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        files = {name.removeprefix("tandem/") for name in wheel.namelist() if name.startswith("tandem/")}
    packaged = {path.parent for path in product_sources() if path.name == "__init__.py"}
    expected = {str(path.relative_to(ROOT)) for path in product_sources() if path.parent in packaged}
    assert {name for name in files if name.endswith(".py") and not name.startswith("deploy/demo-model/")} == expected
    for name in ("py.typed", "deploy/demo-model/config.json", "deploy/demo-model/model.safetensors",
                 "deploy/demo-model/tokenizer.json", "deploy/profiles/demo.yaml"):  # fmt: skip
        assert name in files, name
    strangers = {name for name in files if name.split("/")[0] in ("tests", ".venv", "docs")}
    assert not strangers
