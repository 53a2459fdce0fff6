"""`pipecompile inspect`: what it prints, what it refuses, and that it needs no weights.

PIPECOMPILE_UPDATE_GOLDEN=1 rewrites the golden files.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.ir.errors import PipecompileError
from pipecompile.compiler.plan.plan import PLAN_VERSION
from pipecompile.compiler.report.report import write_report
from pipecompile.compiler.subjects.spec import ModelOptions, Subject, load
from pipecompile.compiler.tensors.fakes import is_fake
from support.commands import SMALL_GPT2, inspect
from support.plans import EXTRAS, hand_made

GOLDEN = Path(__file__).parent / "golden"

MODEL_FILE = """
import helper  # beside this file
import torch
from torch import nn

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(helper.WIDTH, helper.WIDTH) for _ in range(4))
        self.place = nn.Parameter(torch.empty(helper.WIDTH))
        nn.init.trunc_normal_(self.place)  # looks at what it draws
    def forward(self, x):
        x = x + self.place
        for block in self.blocks:
            x = x + block(x).relu()
        return x

def build():
    print("building")
    return Residual(), torch.randn(24, helper.WIDTH), lambda output, batch: output.square().mean()

def lossless():
    return Residual(), torch.randn(24, helper.WIDTH)

def number():
    return 7

def fails():
    return [].pop()

def reads():
    return Residual(), torch.randn(int(torch.randint(8, ()).item()), helper.WIDTH)

def needs(width):
    return width

def ragged():
    return Residual(), {"x": torch.randn(4, helper.WIDTH), "y": torch.randn(3)}
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WIDTH = 16\n")
    file = tmp_path / "models_of_mine.py"
    file.write_text(MODEL_FILE)
    (tmp_path / "broken.py").write_text("import torch\n\nraise SystemExit('no arguments')\n")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "text.json").write_text("model_type: gpt2")
    config = {"model_type": "bert", "architectures": ["BertLMHeadModel"], "hidden_size": 64}
    rest = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | rest | {"vocab_size": 300}))
    return file


def check_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("PIPECOMPILE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"PIPECOMPILE_UPDATE_GOLDEN=1 rewrites {path.name}"


# -- the report ---------------------------------------------------------------------------------


def test_report_of_a_small_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    """But for torch's names of values, its number of operators, and how long the search took."""
    report = inspect(f"{SMALL_GPT2} --stages 2 --dp 2 --microbatches 4", capsys)
    report = re.sub(r"\b([a-z]+)_\d+$", r"\1_#", report, flags=re.MULTILINE)
    report = re.sub(r", in [\d.,]+ (s|ms|µs)$", ", in #", report, flags=re.MULTILINE)
    check_golden("gpt2.txt", re.sub(r"capture: .*", "capture: #", report))


def test_report_of_a_hand_made_plan() -> None:
    stream = io.StringIO()
    write_report(*hand_made(), stream, EXTRAS)
    assert max(map(len, stream.getvalue().splitlines())) <= 80
    check_golden("hand_made.txt", stream.getvalue())


@pytest.mark.slow
def test_logits_in_pieces_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(inspect(f"{SMALL_GPT2} --stages 2 --chunked-loss 16", capsys).split())
    assert "logits of the loss" in said
    assert "exist for 16 tokens at a time" in said
    assert "made again in the backward" in said


def test_a_terminal_gets_lines_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    write_report(*hand_made(), stream, EXTRAS)
    text = stream.getvalue()
    assert "\x1b[" in text
    bare = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert 80 < max(map(len, bare.splitlines())) <= 90


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(inspect(f"{SMALL_GPT2} --stages 2 --batch 6 --json", capsys))
    assert plan["version"] == PLAN_VERSION
    assert (plan["n_stages"], plan["microbatches"], plan["microbatch_rows"]) == (2, 6, 1)
    assert len(plan["schedule"]) == 2


def test_tied_gradients_and_dump(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = f"{SMALL_GPT2} --stages 2 --tied-grads per_step --dump {tmp_path}"
    report = inspect(command, capsys)
    assert "sent once per step (1 × 128.0 KiB), and the sum back" in " ".join(report.split())
    assert "bit-exact" not in report
    (folder,) = tmp_path.iterdir()
    assert (folder / "plan.json").exists()


# -- what SPEC can be ---------------------------------------------------------------------------


def test_function_in_a_file(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(f"inspect {model_file}:build --stages 2 --dp 2 --microbatches 3".split())
    output = capsys.readouterr()
    assert code == 0, output.err
    said = " ".join(output.out.split())
    assert "Residual: 1,104 parameters microbatch: batch: float32[4, 16]" in said
    assert "2 stages × dp 2 = 4 ranks; 3 microbatches of 4 rows per replica, 24 rows" in said
    assert output.err == "building\n"  # stdout is the report's


@pytest.mark.slow
def test_configuration_file(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its architecture decides the task."""
    spec = f"hf:{model_file.with_name('config.json')}"
    report = inspect(f"{spec} --stages 2 --microbatches 2", capsys)
    assert "\nBertLMHeadModel: " in report
    assert "2 microbatches of 1 row per replica, 2 rows per step" in " ".join(report.split())
    assert "int64[1, 64]" in report  # as long as the model can
    report = inspect(f"{spec} --stages 2 --seq 80 --set max_position_embeddings=80", capsys)
    assert "int64[1, 80]" in report


def hub(spec: str, *settings: str, **options: Any) -> Subject:
    return load(f"hf:{spec}", ModelOptions(settings, **options))


@pytest.mark.parametrize(
    ("model_type", "kind", "shapes"),
    [
        ("gpt2", "GPT2LMHeadModel", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("llama", "LlamaForCausalLM", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("mixtral", "MixtralForCausalLM", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("gemma2", "Gemma2ForCausalLM", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("qwen3", "Qwen3ForCausalLM", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("bert", "BertForMaskedLM", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("modernbert", "ModernBertForMaskedLM", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("bart", "BartForConditionalGeneration", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("t5", "T5ForConditionalGeneration", {"input_ids": (8, 512), "labels": (8, 512)}),
        ("vit", "ViTForImageClassification", {"pixel_values": (8, 3, 224, 224), "labels": (8,)}),
    ],
)
def test_model_types(model_type: str, kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    subject = hub(model_type, default_rows=8)
    assert type(subject.model).__name__ == kind
    assert {key: tuple(value.shape) for key, value in subject.batch.items()} == shapes
    assert all(is_fake(p) for p in subject.model.parameters())


@pytest.mark.slow
def test_encoder_decoder_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """T5's default configuration has no decoder_start_token_id, which training needs."""
    sizes = (
        "--set num_layers=1 --set d_model=32 --set d_ff=32 --set num_heads=2 --set vocab_size=64"
    )
    assert "T5ForCond" in inspect(f"hf:t5 {sizes} --seq 16 --stages 2 --microbatches 2", capsys)


@pytest.mark.slow
def test_task_chooses_the_head(capsys: pytest.CaptureFixture[str]) -> None:
    small = SMALL_GPT2.replace("n_layer=2", "n_layer=1")
    command = f"{small} --task sequence-classification --set num_labels=7 --stages 2"
    report = inspect(f"{command} --batch 4", capsys)
    assert "GPT2ForSequenceClassification" in report
    assert "input_ids: int64[1, 32], labels: int64[1]" in report
    assert hub("gpt2", "num_labels=7", task="sequence-classification").model.num_labels == 7


def test_settings_reach_the_configuration() -> None:
    """By alias, in inner configurations and dicts, with what follows from them."""
    layers = ("num_hidden_layers=3", "scale_attn_weights=False", "resid_pdrop=1e-2")
    config: Any = hub("gpt2", *layers).model.config
    assert (config.n_layer, config.scale_attn_weights, config.resid_pdrop) == (3, False, 0.01)
    text: Any = hub("gemma3", "text_config.num_hidden_layers=3").model.config.text_config
    assert len(text.layer_types) == text.num_hidden_layers == 3
    rope: Any = hub("llama", "rope_parameters.rope_theta=500000.0", "num_hidden_layers=1").model
    assert rope.config.rope_parameters["rope_theta"] == 500000.0
    assert rope.config.rope_parameters["rope_type"] == "default"
    assert next(hub("gpt2", "dtype=bfloat16").model.parameters()).dtype == torch.bfloat16


def test_longer_sequences_make_room_for_positions() -> None:
    config: Any = hub("gpt2", seq=3000).model.config
    assert config.n_positions == 3000


# -- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("inspect hf:gpt2", "the following arguments are required: --stages"),
        ("inspect hf:gpt2 --stages 0", "argument --stages: '0' is not a whole number above 0"),
        ("inspect hf:gpt2 --stages two", "'two' is not a whole number above 0"),
        ("inspect hf:gpt2 --stages auto", "--stages auto divides --devices N: say how many"),
        ("inspect hf:gpt2 --stages 2 --devices 4", "--devices has no effect without --stages auto"),
        ("inspect hf:gpt2 --stages auto --devices 4 --dp 2", "--dp cannot be given with"),
        ("inspect hf:gpt2 --stages auto --devices 4 --pin lm_head=1", "--pin cannot be given with"),
        ("inspect hf:gpt2 --stages 2 --pin lm_head", "'lm_head': write it as FQN=STAGE"),
        ("inspect hf:gpt2 --stages 2 --pin lm_head=2", "pin=.*stages are 0 to 1"),
        ("inspect hf:gpt2 --stages 2 --pin a=1 --pin a=0", "--pin a=0: it is pinned to 1 already"),
        ("inspect {file}:build --stages 2 --pin blocs.1=1", "no 'blocs.1': did you mean 'blocks.1"),
        (
            "inspect hf:gpt2 --stages 2 --memory lots",
            "memory='lots': give bytes, or a text such as",
        ),
        ("inspect hf:gpt2 --stages 2 --remat some", "remat='some': use 'auto' or 'none' or 'full'"),
        ("inspect hf:gpt2 --stages 2 --solver x", "solver='x': use 'auto' or"),
        ("inspect hf:gpt2 --stages 2 --time-limit x", "'x' is not a number of seconds"),
        ("inspect hf:gpt2 --stages 2 --time-limit 0", "time_limit_s=0.0 must be above 0"),
        ("inspect hf:gpt2 --stages 2 --device h10", "unknown device 'h10': did you mean 'h100'"),
        ("inspect hf:gpt2 --stages 2 --device {folder}/list.json", "list.json: not a JSON object"),
        ("inspect hf:gpt2 --stages 2 --optimizer lion", "invalid choice: 'lion'"),
        ("inspect hf:gpt2 --stages 2 --compare best", "--compare 'best': known are uniform, param"),
        ("inspect hf:gpt2 --stages 2 --compare uniform,uniform", "--compare names uniform twice"),
        (
            "inspect hf:gpt2 --stages 2 --compare uniform --json",
            "--compare has no effect on --json",
        ),
        ("inspect hf:gpt2 --stages 2 --save absent/plan.json", "--save .*: there is no folder"),
        ("inspect hf:gpt2 --stages 2 --sets a=1", "unrecognized arguments: --sets"),
        ("inspect gpt2 --stages 2", "SPEC 'gpt2' is neither path/to/file.py:function nor hf:"),
        ("inspect absent.py:build --stages 2", "there is no file 'absent.py'"),
        ("inspect {file}:bild --stages 2", "has no function 'bild': did you mean 'build'?"),
        ("inspect {file}:number --stages 2", "number returned a int: it must return a tuple"),
        ("inspect {file}:fails --stages 2", r"py:\d+ with IndexError: pop from empty list"),
        ("inspect {file}:needs --stages 2", "TypeError: needs.. missing 1 required positional"),
        ("inspect {file}:reads --stages 2", "tensors have no data here"),
        ("inspect {file}:lossless --stages 2", "the model's output has shape .* in loss_fn="),
        ("inspect {file}:ragged --stages 2", "'y' has 3 rows, the first leaf 4"),
        ("inspect {folder}/broken.py:build --stages 2", r"py:3 with SystemExit: no arguments"),
        ("inspect {file}:build --stages 2 --seq 9", "--seq has no effect on .*: build.. alone"),
        ("inspect {file}:build --stages 2 --batch 9", "--batch has no effect"),
        ("inspect {file}:build --stages 2 --set a=1", "--set has no effect"),
        ("inspect {file}:build --stages 2 --task causal-lm", "--task has no effect"),
        ("inspect {file}:build --stages 99", "n_stages=99, but the model has only"),
        ("inspect {file}:build --stages 2 --tied-grads no", "tied_grads='no': use 'per_micro"),
        ("inspect hf:lama --stages 2", "no model type 'lama': did you mean 'llama'"),
        ("inspect hf:org/name --stages 2", "nothing is downloaded: give the path of .*config.json"),
        ("inspect hf:wav2vec2 --stages 2", "wav2vec2 has none of the tasks"),
        ("inspect hf:gpt2 --stages 2 --task masked-lm", "gpt2 has only causal-lm, sequence-"),
        ("inspect hf:gpt2 --stages 2 --set n_layers=2", "no 'n_layers': did you mean 'n_layer'"),
        ("inspect hf:gpt2 --stages 2 --set model_type=bert", "GPT2Config has no 'model_type'"),
        ("inspect hf:gpt2 --stages 2 --set n_layer", "--set n_layer: write it as key=value"),
        ("inspect hf:gpt2 --stages 2 --set n_layer=x", "GPT2Config refuses its values: .*n_layer"),
        ("inspect hf:gpt2 --stages 2 --set n_layer.x=1", "n_layer is 12, which has no parts"),
        ("inspect hf:gemma3 --stages 2 --set text_config.hiden_size=8", "mean 'hidden_size'"),
        ("inspect hf:gpt2 --stages 2 --set n_head=7", "cannot build gpt2: .*divisible"),
        ("inspect hf:vit --stages 2 --seq 9", "--seq has no effect on a model of images"),
        ("inspect hf:absent.json --stages 2", "cannot read 'absent.json'"),
        ("inspect hf:{folder}/list.json --stages 2", "it has no 'model_type'"),
        ("inspect hf:{folder}/text.json --stages 2", "text.json is not JSON"),
        ("inspect hf:{folder}/config.json --stages 2 --seq 80", "max_position_embeddings=64: use"),
    ],
)
def test_mistakes_are_one_line(
    command: str, message: str, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(command.format(file=model_file, folder=model_file.parent).split())
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    (line,) = (text for text in output.err.splitlines() if text != "building")
    assert re.match(f"pipecompile: error: .*{message}", line), line


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PipecompileError, match=r"pip install 'pipecompile\[hf\]'"):
        load("hf:gpt2", ModelOptions())


# -- what it does without -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([name, "--help"] for name in ("inspect", "solve", "export"))],
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pipecompile.compiler.cli.main import main\n"
        f"try:\n    main({arguments!r})\n"
        "finally:\n    assert not {'torch', 'transformers', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pipecompile" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_billion_parameters_take_no_memory(tmp_path: Path) -> None:
    """In fp32 they would take 4 GiB."""
    (tmp_path / "big.py").write_text(
        "import torch\n"
        "class Big(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        layers = (torch.nn.Linear(16384, 16384) for _ in range(4))\n"
        "        self.layers = torch.nn.Sequential(*layers)\n"
        "    def forward(self, x):\n"
        "        return self.layers(x).mean()\n"
        "def build():\n"
        "    return Big(), torch.ones(8, 16384)\n"
    )
    code = (
        "import re\nfrom pipecompile.compiler.cli.main import main\n"
        f"assert main(['inspect', {str(tmp_path / 'big.py:build')!r}, '--stages', '2']) == 0\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.partition("\n\n")[2].splitlines()  # behind the verdict
    assert lines[0] == "Big: 1,073,807,360 parameters"
    assert int(lines[-1]) < 2**20  # KiB
