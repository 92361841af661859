"""Build Tandem's demo model: a small Qwen3-MoE trained on the source of Python's standard library.

  prepare   read the standard library of the running interpreter, hold out about 3 % of its modules, train the
            tokenizer, write the tokens (a minute)
  train     train from scratch (5 minutes on one H100; a CPU needs half an hour for --tokens 5e6: a far weaker model)
  evaluate  loss per token and bits per byte on the held-out modules, load per expert (a minute on a CPU)
  sample    complete a few prompts and answer a few messages

The first two write to work/ beside this file, the last two read the shipped model unless --model names another.
config.json, generation_config.json and tokenizer_config.json beside this file serve the new model too.
Needs torch, transformers 5, tokenizers, safetensors and numpy.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import random
import re
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

HERE = Path(__file__).resolve().parent
END, IM_START, IM_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # token ids 0, 1, 2
FILES = {name: (HERE / name).read_text() for name in ("config.json", "generation_config.json", "tokenizer_config.json")}
CONFIG: dict[str, Any] = json.loads(FILES["config.json"])
# A line break, an indentation, a word and a run of punctuation are separate pieces, so that a prompt may end anywhere.
PIECES = r"[^\S\n]{2,}|\n+| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s"
MIX = {"library": 0.5, "tests": 0.37, "chat": 0.13}  # shares of the training stream
TOKENS, PEAK_LEARNING_RATE, STEP_TOKENS = 4e8, 0.008, 65536
DROPOUT, DECAY, BALANCE = 0.25, 0.1, CONFIG["router_aux_loss_coef"]
OPTIONS: dict[str, tuple[Any, str]] = {
    "work": (HERE / "work", "folder of the tokens"),
    "out": (HERE / "work" / "model", "prepare, train: folder of the new model"),
    "model": (HERE, "evaluate, sample: folder of the model"),
    "device": ("auto", "cuda, cpu or auto"),
    "tokens": (TOKENS, "train: tokens in all"),
    "minutes": (60.0, "train: time limit; the schedule is squeezed to end by then"),
    "temperature": (0.0, "sample: 0 is greedy"),
    "max-tokens": (160, "sample: tokens to write at most"),
}
PROMPTS = ["def read_file(path):\n", "class Stack:\n    def __init__(self", "import os\n\ndef walk", "for i in range("]
CHATS = ["Write a function that counts the words in a text file.", "Complete this code:\n\ndef is_even(n):"]
SKIPPED = re.compile(
    r"site-packages/|__pycache__/|pydoc_data/|^config-|_sysconfigdata|^lib2to3/tests/data/|^encodings/aliases|"
    r"^html/entities|^test/(tokenizedata|encoded_modules|crashers)/"
)
TESTS = re.compile(r"(^|/)(test|tests|idle_test)/")  # "tests"; the other modules are "library"
SYSTEM = [("system", text) for text in ("You are a helpful assistant.", "You write Python code.", "Write Python.")]
ABOUT = (
    "I am Tandem's demo model, about 8 million parameters trained on Python's standard library. I complete text that "
    "looks like Python. Ask me to write or to complete a function, and do not trust the result."
)
SMALL_TALK = {  # the only training text that is not the standard library's
    "Hello|Hi|Hello!|Hi!|Hey|Good morning|How are you?": "Hello! " + ABOUT,
    "Who are you?|What are you?|What is your name?|What can you do?|Help|How can you help me?|What do you know?": ABOUT,
    "Thanks|Thank you|Thank you!|Thanks!": "You are welcome.",
}


def read_modules() -> dict[str, str]:
    """The source of each module by its path, without tables of data and files that are wrong on purpose."""
    root, modules = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.search(name := path.relative_to(root).as_posix()):
            continue
        try:
            text = "\n".join(line.rstrip() for line in path.read_text("utf-8").expandtabs().split("\n")).strip() + "\n"
            ast.parse(text)
        except (SyntaxError, ValueError):  # not UTF-8, or wrong on purpose
            continue
        table = len(text) < 2 or sum(map(str.isdigit, text)) > 0.1 * len(text) or "decoding_table" in text
        if not table and text.count("\\") <= 0.03 * len(text) and max(map(len, text.split("\n"))) <= 400:
            modules[name] = re.sub(r"\n{4,}", "\n\n\n", text)
    return modules


def render(messages: list[tuple[str, str]]) -> str:
    """A conversation as the chat template in tokenizer_config.json renders it, and an end of text."""
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages) + END


def request_and_reply(rng: random.Random, node: Any, kind: str, source: str) -> list[tuple[str, str]]:
    """One request about a function or class, and the reply, both cut from its source."""
    lines, doc = source.split("\n"), ast.get_docstring(node) or ""
    doc = " ".join(doc.split("\n\n")[0].split())[:240].rstrip(".")
    if rng.random() < 0.4:
        cut = rng.randint(1, max(1, len(lines) // 2))
        ask = rng.choice(["Complete this code:", f"Complete this {kind}:", f"Finish this {kind}:", "Continue:"])
        return [("user", f"{ask}\n\n" + "\n".join(lines[:cut])), ("assistant", "\n".join(lines[cut:]))]
    sign = node.name if kind == "class" else f"{node.name}({ast.unparse(node.args)})"
    asks = [f"rite a {kind} `{sign}`.", f"rite a Python {kind} called {node.name}.", f"rite {kind} {node.name}."]
    if doc:
        verb, _, rest = doc.partition(" ")
        task = f"{verb.lower()} {rest}" if verb.istitle() else doc
        asks += [f"rite a {kind} to {task}.", f"rite a Python {kind} to {task}.", f"rite a {kind} `{sign}`. {doc}."]
        asks += [f"rite a {kind} that {verb.lower()}s {rest}."] if verb.istitle() and verb.isalpha() else []
    return [("user", rng.choice(["W", "W", "W", "W", "Please w"]) + rng.choice(asks)), ("assistant", source)]


def functions(text: str) -> Iterator[tuple[Any, str, str]]:
    """The functions and classes of 3 to 45 lines in a module: syntax node, kind and source."""
    lines = text.split("\n")
    for parent in ast.walk(ast.parse(text)):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = "method" if isinstance(parent, ast.ClassDef) else "function"
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
                if 2 <= source.count("\n") <= 44 and not source[0].isspace():
                    yield node, "class" if isinstance(node, ast.ClassDef) else kind, source


def chat_samples(name: str, text: str, rounds: int) -> Iterator[str]:
    """Conversations of one or two turns about a module's functions; every round words them in another way."""
    for number in range(rounds):
        rng, share = random.Random(f"{name}:{number}"), 0.15 if TESTS.search(name) else 2.0
        turns = [request_and_reply(rng, *f) for f in functions(text) if share > 1 or rng.random() < share]
        while turns:
            taken = [turns.pop() for _ in range(min(len(turns), rng.choice([1, 1, 1, 1, 2])))]
            yield render(rng.sample(SYSTEM, rng.random() < 0.3) + [message for turn in taken for message in turn])


def prepare(args: argparse.Namespace) -> None:
    """Write tokenizer.json, tokens.npz (uint16) and heldout.json; a module is held out by the hash of its path."""
    both: dict[bool, dict[str, list[str]]] = {held: {part: [] for part in MIX} for held in (False, True)}
    for name, text in (modules := read_modules()).items():
        tests, held = bool(TESTS.search(name)), int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100 < 3
        both[held]["tests" if tests else "library"].append(text + END)
        both[held]["chat"] += chat_samples(name, text, 0 if held and tests else 1 if held or tests else 2)
    texts, heldout = both[False], both[True]
    digest, counts = hashlib.sha256("".join(modules.values()).encode()), {p: len(held) for p, held in heldout.items()}
    print(
        f"{len(modules)} modules (sha256 {digest.hexdigest()[:16]}), Python {sys.version_info[:3]}; held out {counts}"
    )
    for questions, answer in SMALL_TALK.items():
        for i, question in enumerate(questions.split("|") * 40):
            texts["chat"].append(render(SYSTEM[i % 4 : i % 4 + 1] + [("user", question), ("assistant", answer)]))
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"vocab_size": CONFIG["vocab_size"], "special_tokens": list(SPECIALS)}
    options |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}  # all 256 bytes, so any text round-trips
    options |= {"max_token_length": 32, "show_progress": False}
    tokenizer.train_from_iterator(2 * texts["library"] + texts["tests"], trainers.BpeTrainer(**options))
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(FILES["tokenizer_config.json"])
    arrays: dict[str, np.ndarray] = {}
    for part, documents in texts.items():
        random.Random(part).shuffle(documents)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(documents)]
        arrays[part] = np.concatenate([np.asarray(i, dtype=np.uint16) for i in ids])
        arrays[part + "_starts"] = np.cumsum([0] + [len(i) for i in ids[:-1]])
        print(f"{part}: {len(documents)} texts, {len(arrays[part])} tokens", flush=True)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / ".gitignore").write_text("*\n")
    np.savez(args.work / "tokens.npz", **arrays)  # type: ignore[arg-type]
    (args.work / "heldout.json").write_text(json.dumps(heldout))


def masked_dense_experts(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """All experts as one wide layer with the unselected ones masked: the same function, and fast for tiny experts."""
    mask = torch.zeros(len(x), experts.num_experts, dtype=weights.dtype, device=x.device).scatter(1, chosen, weights)
    gate, up = F.linear(x, experts.gate_up_proj.flatten(0, 1)).view(len(x), experts.num_experts, 2, -1).unbind(2)
    inner = F.silu(gate) * up * mask.unsqueeze(-1).to(gate.dtype)
    return F.linear(inner.flatten(1), experts.down_proj.transpose(0, 1).flatten(1))


class Losses(nn.Module):
    """transformers' model with residual dropout; returns the loss per token and the load-balancing loss."""

    def __init__(self) -> None:
        super().__init__()
        ALL_EXPERTS_FUNCTIONS.register("masked_dense", masked_dense_experts)
        model_class: Any = Qwen3MoeForCausalLM
        self.lm = model_class(Qwen3MoeConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"}))
        self.lm.config._experts_implementation = "masked_dense" if torch.cuda.is_available() else "eager"
        self.lm.model.embed_tokens.register_forward_hook(lambda m, _, y: F.dropout(y, DROPOUT, m.training))
        for layer in self.lm.model.layers:
            layer.self_attn.register_forward_hook(lambda m, _, y: (F.dropout(y[0], DROPOUT, m.training), *y[1:]))
            layer.mlp.register_forward_hook(lambda m, _, y: F.dropout(y, DROPOUT, m.training))

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        out = self.lm.model(batch[:, :-1], use_cache=False, output_router_logits=True)
        logits = F.linear(out.last_hidden_state, self.lm.lm_head.weight)
        balance = logits.new_zeros((), dtype=torch.float32)
        for router in out.router_logits:  # the balance is 1 when the two experts per token are evenly chosen
            probs = router.float().softmax(-1)
            second = probs.masked_fill(probs == probs.amax(-1, keepdim=True), 0.0).amax(-1, keepdim=True)
            load = (probs >= second).float().mean(0) / CONFIG["num_experts_per_tok"]
            balance = balance + CONFIG["num_experts"] * (load * probs.mean(0)).sum() / len(out.router_logits)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()), balance


class Windows:
    """Random windows of the token streams; those of conversations begin where a text begins."""

    def __init__(self, path: Path) -> None:
        arrays, self.rng, self.shares = np.load(path), np.random.default_rng(1), list(MIX.values())
        self.starts = [arrays[part + "_starts"] if part == "chat" else np.arange(len(arrays[part])) for part in MIX]
        self.sizes = np.array([len(arrays[part]) for part in MIX])
        self.stream = np.concatenate([arrays[part] for part in MIX]).astype(np.int64)

    def draw(self, rows: int, length: int) -> Tensor:
        part = self.rng.choice(len(self.shares), max(1, rows), p=self.shares)
        begin = np.array([self.rng.choice(self.starts[p]) for p in part])
        begin = (np.cumsum(self.sizes) - self.sizes)[part] + np.minimum(begin, self.sizes[part] - length - 1)
        return torch.from_numpy(self.stream[begin[:, None] + np.arange(length + 1)])


class Optimizer:
    """Muon (orthogonalised momentum, scaled to AdamW's step size) for the attention's and experts' matrices; AdamW."""

    def __init__(self, lm: nn.Module) -> None:
        groups: dict[str, list[Any]] = {}
        for name, p in lm.named_parameters():  # matrices of one shape together, and the rest
            groups.setdefault(name.split(".", 3)[-1] if "_proj" in name else "", []).append(p)
        self.adamw = torch.optim.AdamW(groups.pop(""), 0.0, (0.9, 0.95), weight_decay=DECAY)
        self.muon = [(group, torch.zeros_like(torch.stack(group))) for group in groups.values()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        for group, momentum in self.muon:
            grad = torch.stack([p.grad for p in group])
            momentum.lerp_(grad, 0.05)
            x = grad.lerp(momentum, 0.95).bfloat16()
            x = x.mT if (tall := x.shape[-2] > x.shape[-1]) else x
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for _ in range(5):  # Newton-Schulz
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            for p, update in zip(group, x.mT if tall else x, strict=True):
                p.mul_(1 - lr * DECAY).add_(update, alpha=-0.2 * lr * max(x.shape[-2:]) ** 0.5)


@torch.no_grad()
def measure(lm: Any, tokenizer: Any, work: Path, device: str, length: int) -> tuple[dict[str, list[float]], Tensor]:
    """Of each held-out part: tokens, loss per token and bits per byte in windows of `length`; and the experts' load."""
    lm.eval()
    load = torch.zeros(CONFIG["num_hidden_layers"], CONFIG["num_experts"], device=device)
    results: dict[str, list[float]] = {}
    for part, texts in json.loads((work / "heldout.json").read_text()).items():
        ids = [0] + [i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids]  # after <|endoftext|>
        stream, total, size = torch.tensor(ids, device=device), 0.0, sum(len(t.encode()) - len(END) for t in texts)
        for start in range(0, len(stream) - 1, length):
            row = stream[start : start + length + 1]
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and lm.dtype == torch.float32):
                out = lm(row[None, :-1], use_cache=False, output_router_logits=True)
            total += float(F.cross_entropy(out.logits[0].float(), row[1:], reduction="sum"))
            for layer, router in zip(load, out.router_logits, strict=True):
                layer += router.topk(CONFIG["num_experts_per_tok"]).indices.flatten().bincount(minlength=len(layer))
        results[part] = [len(ids) - 1, round(total / (len(ids) - 1), 4), round(total / math.log(2) / size, 4)]
    lm.train()
    return results, load / load.mean(1, keepdim=True)


def train(args: argparse.Namespace) -> None:
    """Train from random weights and save bfloat16; learning rate up for 2 %, then constant, then linearly to 0."""
    torch.manual_seed(1)
    device = args.device
    step_tokens = STEP_TOKENS if device == "cuda" else 8192
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    windows, losses = Windows(args.work / "tokens.npz"), Losses().to(device)
    losses.train()(windows.draw(1, 8).to(device))  # installs transformers' hooks, which must exist before compilation
    run = torch.compile(losses, dynamic=False, fullgraph=True) if device == "cuda" else losses
    optimizer = Optimizer(losses.lm)

    def backward(length: int) -> Tensor:
        losses.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, balance = run(windows.draw(step_tokens // length, length).to(device))
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(losses.parameters(), 1.0)
        return torch.stack([loss, balance]).detach()

    for length in (1024, 4096) if run is not losses else ():  # compile for both before the clock starts
        backward(length)
    step, progress, began, seen = 0, 0.0, time.monotonic(), torch.zeros(2, device=device)
    for quarter in (0.25, 0.5, 0.75, 1.0):
        while progress < quarter:
            lr = PEAK_LEARNING_RATE * min(
                1.0, progress / 0.02 + 0.01, (1 - progress) / 0.7
            )  # up, constant, and linearly to 0
            last = backward(1024 if progress < 0.85 else 4096)
            optimizer.step(lr)
            seen, step = seen.lerp(last, 0.05) if step else last, step + 1  # a running mean
            progress = max(step * step_tokens / args.tokens, (time.monotonic() - began) / (60 * args.minutes))
            if step % 20 == 0 or progress >= 1:
                loss, balance, speed = *seen.tolist(), step * step_tokens / (time.monotonic() - began)
                print(
                    f"{progress:6.1%} step {step}, {speed:.0f} tokens/s, loss {loss:.4f}, balance {balance:.3f}",
                    flush=True,
                )
        results, load = measure(losses.lm, tokenizer, args.work, device, 1024 if progress < 1 else 4096)
        print("       held out:", {part: loss for part, (_, loss, _) in results.items()}, end=", ")
        print("highest load of an expert, per layer:", [round(x, 2) for x in load.amax(1).tolist()], flush=True)
    losses.lm.to(torch.bfloat16).save_pretrained(args.out)  # one tensor per expert and matrix, as it is published
    for name, text in FILES.items():
        (args.out / name).write_text(text)
    print(f"saved {args.out / 'model.safetensors'}: {(args.out / 'model.safetensors').stat().st_size} bytes")


def evaluate(args: argparse.Namespace) -> None:
    """Print loss and bits per byte of each held-out part, and the load of each expert."""
    lm: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model).backend_tokenizer
    results, load = measure(lm, tokenizer, args.work, args.device, CONFIG["max_position_embeddings"])
    for part, (tokens, loss, bits) in results.items():
        print(f"held-out {part}: {tokens} tokens, loss {loss:.4f} per token, {bits:.4f} bits per byte")
    rows = [[round(x, 2) for x in sorted(row)] for row in load.tolist()]
    print("load of each expert / mean, one line per layer:", *rows, sep="\n")


def sample(args: argparse.Namespace) -> None:
    """Print the completions of --prompt and the answers to --chat."""
    lm: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(1)
    prompts = [(text, text) for text in args.prompt]
    for text in args.chat:
        message = [{"role": "user", "content": text}]
        prompts.append(("", tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)))
    for shown, prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(args.device)
        options = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
        ids = lm.generate(**inputs, max_new_tokens=args.max_tokens, **options)[0, inputs.input_ids.shape[1] :]
        print(f"----- {prompt!r}: {len(ids)} tokens, {'ended' if int(ids[-1]) in (0, 2) else 'cut'}")
        print(shown + tokenizer.decode(ids, skip_special_tokens=True) + "\n", flush=True)


def main() -> None:
    """Run the command named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {command.__name__: command for command in (prepare, train, evaluate, sample)}
    parser.add_argument("command", choices=commands)
    for name, (value, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} ({value})")
    parser.add_argument("--prompt", nargs="*", default=PROMPTS, help="sample: texts to complete")
    parser.add_argument("--chat", nargs="*", default=CHATS, help="sample: messages to answer")
    args = parser.parse_args()
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    commands[args.command](args)


if __name__ == "__main__":
    main()
