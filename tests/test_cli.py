"""The command line as its users meet it: real processes, on seedling and on a tiny GPT-2 saved by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import tiny
from processes import command_line

from espalier.checkpoint.directory import resolve_model
from espalier.cli.main import VERBS


def espalier(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own and expect its exit code."""
    done = command_line(*arguments, **environment)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_of(*arguments: object) -> str:
    """The one line of a refused command: exit code 2, nothing on standard output, no traceback."""
    done = espalier(*arguments, code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr and not done.stdout
    return errors[0]


@pytest.fixture(scope="module", params=["seedling", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "seedling":
        return "seedling"
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny("gpt2", vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"def double_{i}(x):\n    return x * {2 * i}\n\n\n" for i in range(120)))
    return path


@pytest.fixture(scope="module")
def delta(model: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small delta made by the command itself."""
    out = tmp_path_factory.mktemp("deltas") / "delta"
    done = espalier(
        "tune", "--model", model, "--data", text, "--out", out, "--steps", 3, "--batch-size", 2, "--sequence-length", 32,
        "--threads", 1, "--rank", 4, "--learning-rate", 0.01, "--eval-data", text, "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["steps"] == 3 and result["evaluation"][str(text)]["after"]["loss"] < result["evaluation"][str(text)]["before"]["loss"]
    for promised in ("lora: what trains", "plan:", "predicted peak", "tokens/s", "the delta is in"):
        assert promised in done.stderr
    return out


def test_nothing_that_only_helps_loads_torch() -> None:
    check = "import sys, runpy; sys.argv = ['espalier'] + {arguments}\ntry: runpy.run_module('espalier')\nexcept SystemExit: pass\n"
    check += "assert not {{'torch', 'transformers', 'pydantic', 'numpy'}} & set(sys.modules)"
    for arguments in (["--help"], ["tune", "--help"], ["methods"], ["methods", "--json"], ["pretrain", "--help"], ["plan", "--help"], ["--version"]):
        subprocess.run([sys.executable, "-c", check.format(arguments=arguments).replace("{{", "{").replace("}}", "}")], check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", "import espalier, sys; assert 'torch' not in sys.modules"], check=True)


def test_help_of_tune_has_the_options_of_every_method() -> None:
    shown = " ".join(espalier("tune", "--help").stdout.split())
    for method in json.loads(espalier("methods", "--json").stdout):
        for option in method["hyperparameters"] if method["kind"] in ("adapt", "select", "optim") else ():
            assert f"--{option['name'].replace('_', '-')} " in shown
            assert f"{method['name']}(default{option['default']})".replace(" ", "") in shown.replace(" ", "")  # lines break after a hyphen


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_for_every_option(verb: str) -> None:
    shown = espalier(*verb.split(), "--help").stdout
    lines = [line for line in shown.splitlines() if line.startswith("  --")]
    assert lines
    for line in lines:
        following = shown.split(line)[1].splitlines()
        assert len(line.split()) > 2 or following[1].strip(), line


def test_methods_lists_what_the_registry_promises() -> None:
    listed = json.loads(espalier("methods", "--json").stdout)
    assert {"lora", "dora", "mos", "paca", "full", "adamw"} <= {m["name"] for m in listed}
    for method in listed:
        assert set(method) >= {"name", "kind", "ids", "paper", "file", "lines", "hyperparameters"}
        assert method["summary"] and Path(__file__).parents[1].joinpath("src", method["file"]).is_file()
        for h in method["hyperparameters"]:
            assert set(h) == {"name", "type", "default", "help"} and h["help"]
    optimizers = {m["name"] for m in json.loads(espalier("methods", "--kind", "optim", "--json").stdout)}
    assert optimizers == {m["name"] for m in listed if m["kind"] == "optim"} >= {"adamw", "muon"}


def test_eval_measures_base_and_delta(model: str, text: Path, delta: Path) -> None:
    base = json.loads(espalier("eval", "--model", model, "--data", text, "--sequence-length", 32, "--json").stdout)
    tuned = json.loads(espalier("eval", "--model", model, "--delta", delta, "--data", text, "--sequence-length", 32, "--json").stdout)
    off = json.loads(
        espalier("eval", "--model", model, "--delta", delta, "--scale", 0, "--data", text, "--sequence-length", 32, "--json").stdout
    )
    assert set(base) >= {"loss", "perplexity", "bits_per_byte", "tokens", "bytes", "documents", "peak_memory"}
    assert tuned["loss"] < base["loss"] and off["loss"] == pytest.approx(base["loss"], rel=1e-6)
    assert base["bits_per_byte"] == pytest.approx(base["loss"] * base["tokens"] / 0.6931471805599453 / base["bytes"])


def test_generate_continues_the_prompt_and_the_seed_decides(model: str, delta: Path) -> None:
    same = [
        json.loads(espalier("generate", "--model", model, "--delta", delta, "--prompt", "def f", "--max-tokens", 8, "--seed", s, "--json").stdout)
        for s in (1, 1, 2)
    ]
    assert same[0] == same[1] and same[0]["completion"] != same[2]["completion"]
    assert 0 < same[0]["tokens"] <= 8
    assert espalier("generate", "--model", model, "--prompt", "def f", "--max-tokens", 3, "--temperature", 0).stdout.startswith("def f")


def test_apply_writes_a_model_that_transformers_loads(model: str, text: Path, delta: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "applied"
    result = json.loads(espalier("apply", "--model", model, "--delta", delta, "--out", out, "--verify", text, "--json").stdout)
    assert result["changed"] == len(result["tensors"]) > 0 and result["verified"]["agreement"] > 0.9
    AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    here = json.loads(espalier("eval", "--model", out, "--data", text, "--sequence-length", 32, "--json").stdout)
    there = json.loads(espalier("eval", "--model", model, "--delta", delta, "--data", text, "--sequence-length", 32, "--json").stdout)
    assert here["loss"] == pytest.approx(there["loss"], rel=5e-3)
    assert "already exists" in error_of("apply", "--model", model, "--delta", delta, "--out", out)


def test_convert_imports_what_tune_wrote_for_peft(model: str, delta: Path, tmp_path: Path) -> None:
    from espalier.checkpoint.safetensors_file import read_safetensors

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((delta / name).read_bytes())
    espalier("convert", adapter, "--model", model, "--out", tmp_path / "imported")
    ours, again = (read_safetensors(folder / "delta.safetensors") for folder in (delta, tmp_path / "imported"))
    assert ours.keys() == again.keys() and all((ours[n] == again[n]).all() for n in ours)


def test_info_knows_models_deltas_adapters_runs_and_data(model: str, text: Path, delta: Path) -> None:
    assert json.loads(espalier("info", model, "--json").stdout)["kind"] == "model"
    found = json.loads(espalier("info", delta, "--json").stdout)
    assert found["kind"] == "delta" and found["method"] == "lora" and found["hyperparameters"]["rank"] == 4
    assert json.loads(espalier("info", text, "--json").stdout) == {
        "kind": "data", "path": str(text), "examples_of": "text", "files": 1, "bytes": text.stat().st_size, "examples": 1,
    }  # fmt: skip
    assert json.loads(espalier("info", "stdlib:docstrings:heldout", "--json").stdout)["examples_of"] == "prompt"


def test_a_run_is_rerun_by_its_recipe_to_the_same_bits(model: str, delta: Path, tmp_path: Path) -> None:
    recipe = delta / "run" / "recipe.yaml"
    written = recipe.read_text()
    assert all(line in written for line in ("rank: 4", "alpha: 32.0", "scaling: standard", "targets: linear", "beta2: 0.95"))
    espalier("tune", "--config", recipe, "--out", tmp_path / "again")
    assert (tmp_path / "again" / "delta.safetensors").read_bytes() == (delta / "delta.safetensors").read_bytes()
    result = json.loads(espalier("tune", "--config", recipe, "--out", tmp_path / "other", "--steps", 1, "--json").stdout)
    assert result["steps"] == 1


def test_pretrain_begins_a_model_and_goes_on_with_it(text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    seedling = resolve_model("seedling")
    config = json.loads((seedling / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}))
    common = ["--data", text, "--steps", 3, "--batch-size", 2, "--sequence-length", 32, "--threads", 1, "--eval-data", text, "--json"]
    first = json.loads(
        espalier("pretrain", "--architecture", tmp_path / "config.json", "--tokenizer", seedling, "--out", tmp_path / "first", *common).stdout
    )
    assert first["method"] == "full" and first["final_loss"] < 9
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert loaded.config.hidden_size == 64 and str(loaded.dtype) == "torch.bfloat16"
    second = json.loads(espalier("pretrain", "--model", tmp_path / "first", "--out", tmp_path / "second", *common).stdout)
    assert second["evaluation"][str(text)]["after"]["loss"] < first["evaluation"][str(text)]["after"]["loss"]
    assert "not both" in error_of("pretrain", "--model", "seedling", "--architecture", tmp_path / "config.json", "--out", tmp_path / "x", *common[:-1])


TUNE = ("tune", "--model", "seedling", "--steps", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*TUNE, "--method", "lorra"), ("no method is called 'lorra'", "did you mean 'lora'")),
        ((*TUNE, "--method", "paca", "--alpha", 3), ("alpha is no option of paca", "it belongs to")),
        ((*TUNE, "--rank", 0), ("rank is 0", "at least 1")),
        ((*TUNE, "--rank", "many"), ("rank is 'many'", "integer")),
        ((*TUNE, "--targets", "attenton"), ("'attenton' matches no parameter", "did you mean 'attention'")),
        ((*TUNE, "--targets", "*.nothing"), ("matches no parameter",)),
        ((*TUNE, "--targets", "norm"), ("lora takes matrices", "model.layers.0.input_layernorm.weight")),
        ((*TUNE, "--budget", "lots"), ("'lots' is no amount of memory",)),
        ((*TUNE, "--budget", "100MiB"), ("--budget 100.0 MiB is too small", "the least that would do is")),
        ((*TUNE, "--epochs", 2), ("--steps or --epochs, not both",)),
        ((*TUNE, "--learning-rate", 0), ("learning_rate is 0",)),
        ((*TUNE, "--schedule", "cubic"), ("'cubic'", "cosine")),
        ((*TUNE, "--dropout", 0.5, "--method", "dora"), ("dropout 0.5 does not go with dora",)),
        ((*TUNE, "--sequence-length", 4096), ("sequence_length is 4096", "1024 positions")),
        ((*TUNE, "--device", "quantum"), ("--device is 'quantum'",)),
        ((*TUNE, "--seed", 2**64), ("seed is 18446744073709551616", "64 bits")),
        (("tune", "--model", "seedling", "--epochs", "inf"), ("epochs is inf",)),
        ((*TUNE, "--learning_rat", 1), ("no option --learning_rat", "--learning-rate")),
    ],
)
def test_bad_options_of_tune_are_one_clear_error(arguments: tuple[object, ...], words: tuple[str, ...], text: Path, tmp_path: Path) -> None:
    message = error_of(*arguments, "--data", text, "--out", tmp_path / "out")
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "delta.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tun",), ("no verb 'tun'", "did you mean 'tune'")),
        (("tune",), ("needs --model, --data, --out",)),
        (("eval", "--model", "/nowhere", "--data", "x"), ("/nowhere does not exist",)),
        (("eval", "--model", "nobody/nothing-here", "--data", "x"), ("'nobody/nothing-here' is no directory here", "hf download")),
        (("eval", "--model", "seedling", "--data", "/nowhere"), ("--data /nowhere does not exist",)),
        (("eval", "--model", "seedling", "--data", "stdlib:nothing"), ("no data set is called stdlib:nothing", "stdlib:asyncio")),
        (("generate", "--model", "seedling", "--prompt", "x", "--top-p", 0), ("top_p is 0",)),
        (("generate", "--model", "seedling", "--prompt", "x", "--chat"), ("has no chat template",)),
        (("generate", "--model", "seedling", "--prompt", "x" * 9000), ("the model has 1024 positions",)),
        (("generate", "--model", "seedling", "--prompt", "x", "--threads", 0), ("threads is 0",)),
        (("eval", "--model", "seedling", "--data", __file__, "--sequence-length", 1025), ("sequence_length is 1025", "1024 positions")),
        (("info", "/nowhere/at/all"), ("does not exist",)),
        (("methods", "--kind", "adpt"), ("--kind is 'adpt'",)),
        (("convert", "seedling", "--out", "x"), ("neither a delta (no delta.json) nor a PEFT adapter (no adapter_config.json)",)),
    ],
)
def test_other_bad_input_is_one_clear_error(arguments: tuple[object, ...], words: tuple[str, ...]) -> None:
    message = error_of(*arguments)
    assert all(word in message for word in words), message


def test_a_model_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    from espalier.attach.load import load_tokenizer
    from espalier.errors import EspalierError

    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(EspalierError, match="no tokenizer could be loaded from") as refusal:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    import torch

    from espalier.checkpoint.safetensors_file import write_safetensors

    for name, value in (("a", 0.0), ("b", float("nan"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        write_safetensors(tmp_path / name / "model.safetensors", {"w": torch.full((2, 2), value)})
    done = espalier("diff", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "d", "--json", "--quiet")
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["tensors"][0]["norm"] is None


def test_a_model_of_few_positions_needs_no_options_for_it(text: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "gpt2"
    tiny("gpt2", vocab_size=4096, n_positions=48).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(folder)
    espalier("tune", "--model", folder, "--data", text, "--out", tmp_path / "delta", "--steps", 1, "--batch-size", 1)
    assert "sequence_length: 48" in (tmp_path / "delta" / "run" / "recipe.yaml").read_text()
    espalier("eval", "--model", folder, "--delta", tmp_path / "delta", "--data", text)
    made = json.loads(espalier("generate", "--model", folder, "--prompt", "def f", "--max-tokens", 99, "--temperature", 0, "--json").stdout)
    assert 0 < made["tokens"] < 48


def test_a_model_that_lacks_a_tensor_or_has_a_bad_config_is_refused_by_name(tmp_path: Path) -> None:
    import shutil

    from espalier.checkpoint.safetensors_file import read_safetensors, write_safetensors

    folder = tmp_path / "model"
    shutil.copytree(resolve_model("seedling"), folder)
    tensors = read_safetensors(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_safetensors(folder / "model.safetensors", tensors)
    message = error_of("generate", "--model", folder, "--prompt", "x")
    assert "lacks 'model.layers.1.mlp.up_proj.weight'" in message
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    for verb in (("generate", "--prompt", "x"), ("tune", "--data", __file__, "--out", tmp_path / "out")):
        assert "hidden_size" in error_of(verb[0], "--model", folder, *verb[1:])


def test_the_bare_command_says_what_there_is() -> None:
    shown = espalier().stdout
    assert all(verb in shown for verb in VERBS)


def test_a_verification_that_cannot_be_made_leaves_no_model(delta: Path, model: str, tmp_path: Path) -> None:
    (tmp_path / "no.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").write_text("")
    for name, words in (("no.txt", "is not UTF-8 text"), ("empty.txt", "fewer than two tokens")):
        out = tmp_path / "applied"
        assert words in error_of("apply", "--model", model, "--delta", delta, "--out", out, "--verify", tmp_path / name)
        assert not out.exists() and not list(tmp_path.glob(".applied*"))


def test_a_delta_of_another_base_is_refused_with_both_fingerprints(text: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, seed in (("one", 0), ("two", 1)):
        tiny("llama", seed=seed, vocab_size=4096).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(resolve_model("seedling")).save_pretrained(tmp_path / name)
    out = tmp_path / "delta"
    espalier("tune", "--model", tmp_path / "one", "--data", text, "--out", out, "--steps", 1, "--batch-size", 1, "--sequence-length", 16)
    for verb in (("eval", "--data", text), ("generate", "--prompt", "x"), ("apply", "--out", tmp_path / "merged")):
        message = error_of(verb[0], "--model", tmp_path / "two", "--delta", out, *verb[1:])
        assert message.count("sha256:") == 2 and "--any-base" in message
    assert not (tmp_path / "merged").exists()
    espalier("generate", "--model", tmp_path / "two", "--delta", out, "--prompt", "x", "--max-tokens", 2, "--any-base")


def test_recipe_files_with_unknown_options_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: seedling\nrnak: 3\n")
    assert "'rnak' is no option" in error_of("tune", "--config", tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("- a\n- b\n")
    assert "holds no options" in error_of("tune", "--config", tmp_path / "recipe.yaml")


PLUGIN = '''
"""A method of somebody else."""
from espalier.adapt.lora import LoRA
from espalier.registry import adapter


@adapter("halfway", ids=(), paper="nowhere")
class Halfway(LoRA):
    """LoRA, called otherwise."""

    rank: int = 3
    """its rank"""
    zeal: float = 0.5
    """an option of its own"""
'''


def test_a_file_dropped_in_becomes_a_method_with_its_options(model: str, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "halfway.py"
    file.write_text(PLUGIN)
    shown = " ".join(espalier("tune", "--help", "--plugin", file).stdout.split())
    assert "--zeal" in shown and "halfway (default 0.5)" in shown
    out = tmp_path / "out"
    command = ["tune", "--model", model, "--data", text, "--out", out, "--steps", 1, "--batch-size", 1, "--sequence-length", 16]
    espalier(*command, "--method", "halfway", "--zeal", 0.25, "--plugin", file)
    stored = json.loads((out / "delta.json").read_text())["hyperparameters"]
    assert (stored["rank"], stored["zeal"], stored["alpha"]) == (3, 0.25, 32.0), "its own, and those of the method that it stands on"
    assert "no method is called 'halfway'" in error_of(*command, "--method", "halfway")
