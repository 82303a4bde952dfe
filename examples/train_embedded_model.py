"""Train the tiny Llama that ships in ipex_quant/data, from text that every Python installation carries.

Text: the language reference in pydoc_data.topics, and the docstrings and comment blocks of the standard library, read
with ast and tokenize so that no module is imported. Some documents, chosen by a hash of their name, are held out, and
paragraphs that the other documents share with them are removed from the training text.

The run is seeded: the same machine, Python version and torch version give the same model. Another Python version has
other text, and another CPU or thread count rounds differently, so that the model differs a little.
"""

import argparse
import ast
import hashlib
import io
import math
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA_DIR = Path(__file__).resolve().parents[1] / "ipex_quant" / "data"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256
SHINGLE_WORDS = 10
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def prose(source: str) -> str:
    """Docstrings and blocks of whole-line comments of one Python source, in their order."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    passages = [
        (node.body[0].lineno, ast.get_docstring(node))
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node)
    ]
    block: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            block.append(token.string.lstrip("#!:").strip())
        elif token.type != tokenize.NL or not token.line.strip():
            if len(block) > 1:
                passages.append((token.start[0], "\n".join(block)))
            block = []
    return "\n\n".join(text for _, text in sorted(passages))


def documents() -> Iterator[tuple[str, str, bool]]:
    """Yield (name, text, may be held out): a file with a copyright line of its own is not for redistribution here."""
    for name, text in sorted(topics.items()):
        yield f"pydoc_data.topics: {name}", text, True
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(name.parts) or name.parts[0] == "pydoc_data":
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        yield name.as_posix(), prose(source), "copyright" not in source.lower()


def shingles(paragraph: str) -> set[str]:
    """All runs of SHINGLE_WORDS words; a shorter paragraph is one run."""
    words = paragraph.split()
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def split_documents(held_out_share: float) -> tuple[list[str], list[str], list[str]]:
    """Return training texts, held-out texts and held-out names; no two paragraphs of the result share a shingle."""
    train, held_out = [], []
    for name, text, may_hold_out in documents():
        chance = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
        (held_out if may_hold_out and chance < held_out_share else train).append((name, text))
    seen: set[str] = set()

    def unseen_part(text: str) -> str:
        kept = []
        for paragraph in text.split("\n\n"):
            runs = shingles(paragraph)
            if paragraph.strip() and seen.isdisjoint(runs):
                kept.append(paragraph)
                seen.update(runs)
        return "\n\n".join(kept)

    held_out_texts = [unseen_part(text) for _, text in held_out]
    train_texts = [unseen_part(text) for _, text in train]
    return [t for t in train_texts if t], [t for t in held_out_texts if t], [name for name, _ in held_out]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE fitted to the training texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, CONFIG.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one int64 stream, each one opened by the end-of-text token."""
    encoded = tokenizer(texts)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [tokenizer.bos_token_id, *ids]])


def batches(stream: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Shuffled [batch_size, CONTEXT] windows without end; every epoch cuts the stream at another offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        count = (len(stream) - offset) // CONTEXT
        windows = stream[offset : offset + count * CONTEXT].view(count, CONTEXT)
        order = torch.randperm(count, generator=generator)
        yield from windows[order[: count - count % batch_size]].split(batch_size)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over a twentieth of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizers(model: LlamaForCausalLM, options: argparse.Namespace) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon (Jordan et al. 2024) for the weights of linears and AdamW for the rest, each with its peak learning rate."""
    embedding = model.get_input_embeddings().weight
    linears = [p for p in model.parameters() if p.dim() > 1 and p is not embedding]
    norms = [p for p in model.parameters() if p.dim() == 1]
    rest = [{"params": [embedding], "weight_decay": options.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    muon = torch.optim.Muon(linears, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True)
    return [(muon, options.learning_rate), (adamw, options.learning_rate / 2)]


def train(stream: torch.Tensor, options: argparse.Namespace) -> LlamaForCausalLM:
    """Train in bfloat16 over float32 weights; the returned model's weights are bfloat16."""
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(CONFIG).train()
    optimizers_and_peaks = optimizers(model, options)
    source = batches(stream, options.batch_size, options.seed)
    bar = tqdm(range(options.steps), desc="training", mininterval=5)
    for step in bar:
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers_and_peaks:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, peak)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.to(torch.bfloat16).eval()


def unigram_perplexity(tokens: torch.Tensor) -> float:
    """Perplexity of the unigram model fitted to these very tokens: no other unigram model does better on them."""
    shares = tokens.bincount().double() / len(tokens)
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Perplexity over consecutive windows of CONTEXT tokens; the first token of a window is not predicted."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [
        cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:])
        for window in tqdm(windows, desc="held-out text", mininterval=5)
    ]
    return torch.stack(losses).mean().exp().item()


def replace_directory(target: Path, save: Callable[[Path], None]) -> None:
    """Let save(directory) fill a temporary sibling of target, then put that in target's place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        save(fresh)
        if target.exists():
            target.rename(Path(scratch) / "stale")
        fresh.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="folder of tiny_llama/ and held_out.txt")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=8, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--held-out-share", type=float, default=0.1, help="of the documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    train_texts, held_out_texts, held_out_names = split_documents(options.held_out_share)
    held_out_text = "\n\n".join(held_out_texts) + "\n"
    tokenizer = train_tokenizer(train_texts)
    stream = token_stream(tokenizer, train_texts)
    held_out = token_stream(tokenizer, [held_out_text])
    print(f"{len(stream)} training tokens, {len(held_out)} held-out tokens ({len(held_out_text)} characters) of:")
    print("\n".join(held_out_names))

    start = time.monotonic()
    model = train(stream, options)
    minutes = (time.monotonic() - start) / 60

    def save(directory: Path) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "model.safetensors").chmod(0o644)  # written readable by its owner alone

    replace_directory(options.out / "tiny_llama", save)
    (options.out / "held_out.txt.new").write_text(held_out_text, encoding="utf-8")
    (options.out / "held_out.txt.new").rename(options.out / "held_out.txt")
    unigram, reached = unigram_perplexity(held_out), perplexity(model, held_out)
    print(f"{model.num_parameters()} parameters, {minutes:.1f} minutes of training")
    print(f"held-out perplexity {reached:.1f}, unigram {unigram:.1f}, ratio {unigram / reached:.1f}")


if __name__ == "__main__":
    main()
