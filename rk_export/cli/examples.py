"""Examples of each command: `--help` and the reference page show them, and a test parses every one."""

from __future__ import annotations

# Command -> (what is typed after `rk-export`, what it does).
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "compress": (
        ("compress MODEL -o out/bundle", "the best model of plain INT4's size"),
        ("compress MODEL -o out/bundle --size 90MB", "the best model of that size"),
        ("compress MODEL -o out/bundle --recipe w8a8", "another recipe"),
        ("compress MODEL -o out/bundle --recipe floats --keep 0.9", "low rank in floats"),
        (
            "compress MODEL -o out/bundle --recipe mine.yaml --set heal.steps=100",
            "your own, with a step more",
        ),
        (
            "compress MODEL -o out/bundle --speed-up 1.8 --set budget.phase=prefill",
            "as fast as that, measured here",
        ),
        ("compress MODEL -o out/bundle --recipe int4 --ep cuda", "for a GPU"),
        ("compress MODEL -o out/bundle --plan plan.json", "apply a plan that you edited"),
        ("compress MODEL -o out/bundle --dry-run", "memory, disk and time of each stage; nothing is done"),
    ),
    "analyze": (
        ("analyze MODEL -o out/spectra", "spectra of q/k and gate/up"),
        ("analyze MODEL -o out/spectra --recipe joint-rank --keep 0.9", "with the ranks of a recipe marked"),
    ),
    "plan": (("plan MODEL -o plan.json --size 90MB", "one line for each choice, to read and edit"),),
    "recipes": (
        ("recipes", "all presets"),
        ("recipes int4", "the file of one, to redirect and edit"),
        ("recipes --steps", "every step and field"),
    ),
    "prepare": (
        ("prepare MODEL -o out/off-grid", "the same logits, other weights"),
        ("prepare MODEL -o out/rotated --passes fold,rotate,rotate-heads", "the preparations that you name"),
    ),
    "export": (
        ("export out/checkpoint -o out/bundle", "a compressed checkpoint, as it is"),
        ("export MODEL -o out/dense --ep portable", "a dense model in fp16"),
    ),
    "verify": (
        ("verify out/bundle", "files, and the tiers that a bundle shows alone"),
        ("verify out/bundle --against MODEL", "every tier"),
        ("verify out/bundle --key PUBLIC.pem", "who made it, before anything else"),
    ),
    "sign": (("sign out/bundle --key KEY.pem", "writes out/bundle/rk_manifest.json.sig"),),
    "eval": (
        ("eval out/bundle --text eval.txt --tokens 5120", "perplexity"),
        ("eval MODEL out/bundle --text eval.txt --tasks tasks/piqa.jsonl --limit 250", "side by side"),
    ),
    "run": (
        ("run out/bundle", "a conversation"),
        ('run out/bundle --chat -p "Where is the Eiffel Tower?"', "one answer"),
        ('run out/bundle -p "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 7', "a sampled text"),
        (
            'run out/bundle --chat -p "How much is 17 times 4?" --template-arg enable_thinking=false',
            "an argument of the chat template",
        ),
    ),
    "bench": (("bench out/bundle --against out/dense genai:out/bundle", "in turns, with ratios"),),
    "compare": (
        ("compare out/a out/b out/c", "a table"),
        ("compare MODEL out/a out/b --text eval.txt --speed -o page.html", "measured anew, on a page"),
    ),
    "report": (
        ("report out/bundle", "the summary"),
        ("report out/bundle --open", "the page in your browser"),
    ),
    "bundle": (
        ("bundle out/bundle --for triton,kserve --name my-model", "files for servers"),
        ("bundle out/bundle --for kubernetes --storage pvc://models/my-model", "a kustomize base"),
    ),
    "explain": (("explain out/bundle", "every matrix, with the reason"),),
    "cache": (
        ("cache", "kinds, models, sizes, and when each was used last"),
        ("cache --prune", "down to the limit"),
        ("cache --prune --older-than 30 --dry-run", "what would go"),
        ("cache --prune --kind self-text --to 1GB", "one kind, the oldest first"),
    ),
    "doctor": (("doctor", "what works here"),),
}


def epilog(command: str) -> str | None:
    """Return the examples of a command as its help shows them."""
    examples = EXAMPLES.get(command)
    if examples is None:
        return None
    width = max(len(typed) for typed, _ in examples)
    lines = (f"  rk-export {typed:<{width}}  # {meaning}" for typed, meaning in examples)
    return "\n".join(["examples:", *lines])
