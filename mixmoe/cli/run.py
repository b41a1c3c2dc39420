"""``mixmoe run``: a model's experts quantised, and its answer beside transformers' own.

Greedy tokens of the model as it is; then, layer by layer, the experts are replaced and judged on
the inputs that transformers' own run gave them; then the tokens again, through mixmoe.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mixmoe import accuracy, backends
from mixmoe.errors import MixMoEError
from mixmoe.module import require_unsmoothed
from mixmoe.spec import Recipe

REPEATS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """What transformers' own run gave one experts module, and what it made of it."""

    inputs: tuple[Tensor, Tensor, Tensor]
    output: Tensor


@dataclass(frozen=True, slots=True)
class Line:
    """One MoE layer of the table: errors against transformers, times in us, bytes of weights."""

    name: str
    recipe: Recipe
    mean: float
    worst: float
    us: float
    eager_us: float
    bytes: int
    dense_bytes: int


def run(
    model: Annotated[
        str, typer.Option(help="a checkpoint folder, or qwen3-moe, mixtral, deepseek-v3, gpt-oss")
    ] = "qwen3-moe",
    recipe: Annotated[str, typer.Option(help="a8w4, a16w4, ...; mixmoe info lists them")] = "a8w4",
    tokens: Annotated[int, typer.Option(min=1, help="how many to generate")] = 16,
    backend: Annotated[str | None, typer.Option(help="the device's own by default")] = None,
    prompt: Annotated[str, typer.Option(help="for a checkpoint with a tokenizer")] = "The capital",
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu")] = None,
) -> None:
    """Run a model with quantised experts; show its tokens and each layer's error, time and size."""
    require_unsmoothed(Recipe.named(recipe))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backends.pick(device, backend)
    console = Console()
    with torch.inference_mode(False), torch.no_grad():
        loaded, tokenizer = load(model, device)
        ids = prompt_ids(loaded, tokenizer, prompt).to(device)
        with console.status("transformers' own run"):
            records, eager_us = record(loaded, ids)
            want = generate(loaded, ids, tokens)
        lines = []
        with console.status("quantising") as status:
            for name, module in records.items():
                status.update(f"quantising {name}")
                one = judge(loaded, name, module, recipe, backend, eager_us[name])
                lines.append(one)
        with console.status("through mixmoe"):
            got = generate(loaded, ids, tokens)
            agree = agreement(loaded, want, ids.shape[1])
    say(console, tokenizer, ids, want, got)
    console.print(table(lines))
    if not Path(model).is_dir():
        console.print("[dim]random weights rank tokens almost alike: small errors part the answers")
    console.print(summary(model, lines, want, got, agree))


def load(model: str, device: str) -> tuple[Any, Any]:
    """The model on its device, eager experts, and its tokenizer where it has one."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as missing:
        absent = f"no {missing.name}"
        raise MixMoEError("run needs transformers", absent, "pip install '.[hf]'") from None
    from mixmoe import hf
    from mixmoe.hf.models import SMALL, small_model

    hf.register()
    if model in SMALL:
        small: Any = small_model(model, experts_implementation="eager")
        return small.to(device), None
    if not (Path(model) / "config.json").is_file():
        raise MixMoEError(
            "--model is a checkpoint folder (with config.json) or a small model", model,
            ", ".join(SMALL),
        )
    try:
        options = {"dtype": "auto", "experts_implementation": "eager"} | unpacked(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, **options)
        has_tokenizer = (Path(model) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(model) if has_tokenizer else None
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise MixMoEError("transformers cannot load this model", f"{model}: {error}") from error
    return loaded.eval().to(device), tokenizer


def unpacked(folder: str) -> dict[str, Any]:
    """What makes transformers unpack an MXFP4 or fp8 checkpoint, so that its own run needs neither
    a GPU nor a kernel from the Hub."""
    from transformers import AutoConfig
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    quantised = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) or {}
    kinds: dict[str, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    kind = kinds.get(str(quantised.get("quant_method")))
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def prompt_ids(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """The prompt's ids, or eight random ones where there is no tokenizer."""
    if tokenizer is not None:
        return tokenizer(prompt, return_tensors="pt").input_ids
    g = torch.Generator().manual_seed(0)
    return torch.randint(2, model.config.get_text_config().vocab_size, (1, 8), generator=g)


def record(model: Any, ids: Tensor) -> tuple[dict[str, Recorded], dict[str, float]]:
    """Inputs, outputs and times of every experts module in one pass over the prompt."""
    from mixmoe import hf

    records: dict[str, Recorded] = {}
    modules = dict(hf.experts_of(model))
    if not modules:
        raise MixMoEError("the model must hold experts", type(model).__name__)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x, ids, weights = (t.clone() for t in args)
            records[name] = Recorded((x, ids, weights), output.clone())

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    model(ids)
    for hook in hooks:
        hook.remove()
    times = {n: microseconds(modules[n], *records[n].inputs) for n in records}
    return records, times


def judge(
    model: Any, name: str, seen: Recorded, recipe: str, backend: str | None, eager_us: float
) -> Line:
    """Replace one experts module and compare it with what transformers' own gave."""
    from mixmoe import hf
    from mixmoe.hf.stored import parameters_of

    module = model.get_submodule(name)
    dense_bytes = sum(t.nbytes for t in parameters_of(module))
    parent, _, last = name.rpartition(".")
    holder = nn.ModuleDict({last: module})
    hf.convert(holder, recipe, backend=backend, dtype=seen.output.dtype)
    experts: Any = holder[last]
    setattr(model.get_submodule(parent), last, experts)
    errors = accuracy.row_errors(experts(*seen.inputs), seen.output)
    us = microseconds(experts, *seen.inputs)
    size = sum(t.nbytes for t in experts.buffers())
    return Line(
        name, experts.layer.recipe, float(errors.mean()), accuracy.worst(errors),
        us, eager_us, size, dense_bytes,
    )


def microseconds(call: Any, *args: Tensor) -> float:
    """Median of a few calls, after one that warms up."""
    call(*args)
    taken = []
    for _ in range(REPEATS):
        synchronise(args[0])
        start = time.perf_counter()
        call(*args)
        synchronise(args[0])
        taken.append(time.perf_counter() - start)
    return median(taken) * 1e6


def synchronise(t: Tensor) -> None:
    """Wait for a GPU to finish."""
    if t.is_cuda:
        torch.cuda.synchronize(t.device)


def generate(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """Greedy continuation, prompt included."""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)


def agreement(model: Any, want: Tensor, prompt: int) -> float:
    """Share of transformers' tokens that mixmoe also ranks first, given the same tokens before."""
    best = model(want[:, :-1]).logits[:, prompt - 1 :].argmax(dim=-1)
    return float((best == want[:, prompt:]).float().mean())


def say(console: Console, tokenizer: Any, ids: Tensor, want: Tensor, got: Tensor) -> None:
    """Both answers, tokens that part from transformers' in yellow."""
    start = ids.shape[1]
    if tokenizer is not None:
        console.print("[bold]prompt       ", tokenizer.decode(ids[0]))
        console.print("[bold]transformers ", tokenizer.decode(want[0, start:]))
        console.print("[bold]mixmoe       ", tokenizer.decode(got[0, start:]))
        return
    rows = {"prompt": (ids[0], ids[0]), "transformers": (want[0, start:], want[0, start:])}
    rows["mixmoe"] = (got[0, start:], want[0, start:])
    for title, (answer, other) in rows.items():
        words = list(marked(answer.tolist(), other.tolist()))
        console.print(f"[bold]{title:12}[/] " + " ".join(words), highlight=False)


def marked(answer: list[int], other: list[int]) -> Iterator[str]:
    """Token ids, those that differ in yellow."""
    for at, token in enumerate(answer):
        same = at < len(other) and other[at] == token
        yield f"{token:>3}" if same else f"[yellow]{token:>3}[/]"


def table(lines: list[Line]) -> Table:
    """A row per MoE layer."""
    title = "experts, each layer on the input transformers' own run gave it"
    tight: Any = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    made = Table(title=title, title_justify="left", **tight)  # fits 80 columns
    made.add_column("layer", no_wrap=True)
    made.add_column("recipe", no_wrap=True)
    for column in ("error", "worst", "allowed", "us", "eager us", "bytes", "dense"):
        made.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        expected = accuracy.layer_noise(line.recipe)
        colour = "green" if line.worst <= 1.25 * expected else "yellow"
        made.add_row(
            short(line.name), line.recipe.name, f"{line.mean:.2%}", f"[{colour}]{line.worst:.2%}",
            f"{1.25 * expected:.2%}", f"{line.us:.0f}", f"{line.eager_us:.0f}", f"{line.bytes:,}",
            f"{line.bytes / line.dense_bytes:.0%}",
        )
    return made


def short(name: str) -> str:
    """A layer's number, or the whole name where there is none."""
    found = re.search(r"layers\.(\d+)\.", name)
    return found[1] if found else name


def summary(model: str, lines: list[Line], want: Tensor, got: Tensor, agree: float) -> str:
    """One line: what ran, how far off, how much smaller, how many tokens agree."""
    size, dense = sum(x.bytes for x in lines), sum(x.dense_bytes for x in lines)
    mean = sum(x.mean for x in lines) / len(lines)
    same = "the same tokens as" if torch.equal(want, got) else "tokens that part from"
    return (
        f"[bold]{model}[/]: {len(lines)} MoE layers in {lines[0].recipe.name}, mean error "
        f"{mean:.2%}, weights {size / 1e6:.2f} MB of {dense / 1e6:.2f} MB ({dense / size:.1f}x "
        f"smaller), {same} transformers, {agree:.0%} of its tokens ranked first"
    )
