"""The report as text, Markdown and HTML: complete, aligned, and safe with hostile names."""

from __future__ import annotations

import base64
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_reader import PageReader
from sample_report import LAYERS, full_report, spectrum

from rk_export.report import humanize, plots, render
from rk_export.report.definitions import definition_of
from rk_export.report.matrix_groups import matrix_groups, split_target
from rk_export.report.records import Finding, LayerError, Outcome, Report
from rk_export.report.sections import TITLES
from rk_export.report.table import Column, make_table
from rk_export.report.tables import matrices_table

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert('x')</script>|`*_$x^{$&\"\x1b[2J\n# head"
EMPTY = Report("example/model", "llama", "2026-01-02")
DATA = "data:image/svg+xml;base64,"


@pytest.fixture(scope="module")
def page() -> str:
    return render.html(full_report())


def hostile_report() -> Report:
    """Return the full report with a hostile string wherever the report holds one."""
    report = full_report()
    target = f"layers.1.{HOSTILE}"
    skipped = Finding(target, Outcome.SKIPPED, HOSTILE, 10, 10)
    applied = Finding(target, Outcome.APPLIED, "", 10, 5, 0.1, {"rank": 3, "bits": HOSTILE})
    return dataclasses.replace(
        report,
        model=HOSTILE,
        command=HOSTILE,
        versions={HOSTILE: HOSTILE},
        findings=(skipped, applied),
        fusions=(dataclasses.replace(report.fusions[0], pattern=HOSTILE, reason=HOSTILE),),
        parity=(dataclasses.replace(report.parity[0], name=HOSTILE, note=HOSTILE),),
        spectra=(dataclasses.replace(spectrum(1, 2), target=target),),
        notices=(HOSTILE,),
    )


def test_every_section_of_a_full_report_is_on_the_page(page: str) -> None:
    reader = PageReader(page)
    for anchor, title in TITLES.items():
        assert ("id", anchor) in reader.attributes
        assert title in reader.text


def test_every_section_of_a_full_report_is_in_the_markdown() -> None:
    headings = re.findall(r"^## (.*)$", render.markdown(full_report()), flags=re.MULTILINE)
    assert headings == list(TITLES.values())


@pytest.mark.parametrize("form", [render.text_table, render.markdown, render.html])
def test_nothing_that_was_not_applied_is_silent(form: object) -> None:
    assert callable(form)
    text = form(full_report()).replace("\\_", "_")
    for finding in full_report().findings:
        if finding.outcome is not Outcome.APPLIED:
            assert finding.reason in text
    assert "layer 2 has no key norm" in text
    assert "FAIL" in text
    assert full_report().notices[0] in text


def test_explain_gives_each_group_one_line_with_its_reason() -> None:
    lines = render.findings_table(full_report().findings).splitlines()
    assert len(lines) == 1 + 2 * LAYERS
    first = lines[1].split()
    assert first[:2] == ["layers.0.self_attn.qk", "partly"]
    assert lines[1].endswith("matched by ignore")
    factorized = lines[3].split()
    assert factorized[:5] == ["layers.1.self_attn.qk", "applied", "4", "4", "32"]
    assert factorized[5:] == ["4.00", "kB", "500", "B", "12.5", "%", "0.125,", "0.0625"]


def test_columns_line_up() -> None:
    lines = render.findings_table(full_report().findings).splitlines()
    starts = {line.index(word) for line in lines for word in ("applied", "partly", "refused") if word in line}
    assert starts == {lines[0].index("outcome")}
    ends = {
        match.end() for line in lines[1:] if (match := re.search(r"\d ([kM]?B)(?= +\d[\d.]* [kM]?B)", line))
    }
    assert len(ends) == 1


def test_unfilled_columns_are_left_out() -> None:
    table = make_table((Column("a"), Column("b"), Column("c", "number")), [("x", "", "–"), ("y", "", "2")])
    assert [column.title for column in table.columns] == ["a", "c"]
    assert table.text() == "a  c\nx  –\ny  2"


def test_wide_characters_take_two_places() -> None:
    table = make_table((Column("名前", "name"), Column("n", "number")), [("a", "1"), ("日本語", "22")])
    assert table.text() == "名前     n\na        1\n日本語  22"


def test_text_is_not_folded_and_prose_on_a_terminal_is() -> None:
    prose = "a reason of many words " * 20
    table = make_table((Column("name", "name"), Column("why")), [("layers.0.qk", prose)])
    assert len(table.text().splitlines()) == 2
    assert table.least_width == len("layers.0.qk") + 2 + 12


def test_layers_with_the_same_reason_share_a_line() -> None:
    findings = [Finding(f"layers.{i}.mlp.gate_up", Outcome.SKIPPED, "too small") for i in (0, 1, 2, 5)]
    text = render.text_table(dataclasses.replace(EMPTY, findings=tuple(findings)))
    assert text.count("too small") == 1
    assert "0-2,5" in text


def test_empty_sections_are_left_out() -> None:
    assert "##" not in render.markdown(EMPTY)
    assert "section" not in PageReader(render.html(EMPTY)).tags
    assert render.text_table(EMPTY) == "example/model (llama), 2026-01-02"


def test_a_notice_says_why_a_section_is_empty() -> None:
    report = dataclasses.replace(EMPTY, notices=("spectra: the model was loaded from a checkpoint",))
    for text in (render.markdown(report), PageReader(render.html(report)).text):
        assert "Singular spectra" in text
        assert "the model was loaded from a checkpoint" in text


def test_a_report_of_spectra_alone_renders(page: str) -> None:
    report = dataclasses.replace(EMPTY, spectra=full_report().spectra)
    reader = PageReader(render.html(report))
    assert reader.tags.count("img") == 1
    assert reader.tags.count("table") == 1
    assert PageReader(page).tags.count("img") == 6


def test_hostile_names_are_escaped_on_the_page() -> None:
    page = render.html(hostile_report())
    reader = PageReader(page)
    assert "script" not in reader.tags
    assert "alert('x')" in reader.text
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def test_hostile_names_do_not_break_markdown_tables() -> None:
    for block in render.markdown(hostile_report()).split("\n\n"):
        if block.startswith("|"):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(cells) == 1
    assert not re.search(r"^# head", render.markdown(hostile_report()), flags=re.MULTILINE)


def test_hostile_names_cannot_steer_a_terminal() -> None:
    assert len(render.findings_table(hostile_report().findings).splitlines()) == 2
    assert "\x1b" not in render.text_table(hostile_report())
    assert len(render.text_table(EMPTY).splitlines()) == 1


def test_the_page_loads_nothing(page: str) -> None:
    reader = PageReader(page)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    links = [value for name, value in reader.attributes if name in ("href", "srcset", "action")]
    assert links
    assert all(value.startswith("#") for value in links)
    assert all(value.startswith(DATA) for name, value in reader.attributes if name == "src")
    rest = re.sub(f'{DATA}[^"]*', "", page)
    assert not [text for text in ("http", "@import", "url(") if text in rest]


def test_a_drawing_loads_nothing(page: str) -> None:
    reader = PageReader(page)
    drawings = [
        base64.b64decode(value.removeprefix(DATA)).decode()
        for name, value in reader.attributes
        if name == "src"
    ]
    assert len(drawings) == 6
    for drawing in drawings:
        targets = [*re.findall(r'href="([^"]*)"', drawing), *re.findall(r"url\(([^)]*)\)", drawing)]
        assert all(target.startswith("#") for target in targets)
        assert not [text for text in ("<script", "<image", "@import") if text in drawing]
        assert "'DejaVu Sans', sans-serif" in drawing


def test_ids_are_unique_and_every_link_has_its_target(page: str) -> None:
    reader = PageReader(page)
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in reader.attributes if name == "href"} <= set(ids)


def test_numbers_lead_to_what_they_mean(page: str) -> None:
    reader = PageReader(page)
    linked = {value[1:] for name, value in reader.attributes if name == "href" and "#meaning-" in value}
    shown = {value for name, value in reader.attributes if name == "id" and value.startswith("meaning-")}
    assert linked == shown - {"meaning-title"}
    for anchor in ("kept", "tier-c", "relative", "rank", "error", "effective"):
        assert f"meaning-{anchor}" in linked
    assert definition_of("rank").meaning in reader.text


def test_plots_have_names_and_tables_have_headers(page: str) -> None:
    assert len(re.findall(r'<img src="data:[^"]+" alt="[^"]+">', page)) == page.count("<img")
    reader = PageReader(page)
    assert reader.tags.count("th") == reader.attributes.count(("scope", "col"))
    assert reader.tags.count("table") == reader.tags.count("thead")
    assert ("lang", "en") in reader.attributes


def test_the_page_is_the_same_every_time(page: str) -> None:
    assert render.html(full_report()) == page


def test_a_thirty_layer_page_stays_small() -> None:
    values = [0.99**i for i in range(1000)]
    report = dataclasses.replace(
        full_report(),
        layer_errors=tuple(LayerError(i, 0.1, 0.2) for i in range(30)),
        spectra=tuple(
            dataclasses.replace(spectrum(i, 300), singular_values=values, full_rank=1000) for i in range(30)
        ),
        findings=tuple(
            Finding(f"layers.{i}.role{j}", Outcome.APPLIED, "", 4000, 500, 0.1, {"rank": 64, "bits": 4})
            for i in range(30)
            for j in range(7)
        ),
    )
    assert len(render.html(report).encode()) < 1_000_000


def test_terminal_tables_do_not_wait_for_matplotlib() -> None:
    code = "import sys, rk_export.report.render; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_spectra_plots_are_written_once_a_role(tmp_path: Path) -> None:
    odd = dataclasses.replace(spectrum(0, None), target="lm/head $x^{$", singular_values=[0.0, 0.0])
    paths = plots.save_spectra_plots((*full_report().spectra, odd), tmp_path / "plots")
    assert [path.name for path in paths] == [
        "spectra-self_attn.qk.svg",
        "spectra-self_attn.qk.png",
        "spectra-lm_head__x___.svg",
        "spectra-lm_head__x___.png",
    ]
    before = [path.read_bytes() for path in paths]
    assert before[1].startswith(b"\x89PNG")
    plots.save_spectra_plots((*full_report().spectra, odd), tmp_path / "plots")
    assert [path.read_bytes() for path in paths] == before


def test_selected_spectra_span_the_layers_of_every_role() -> None:
    spectra = [spectrum(layer, 2) for layer in range(30)]
    spectra += [dataclasses.replace(item, target=item.target.replace("qk", "vo")) for item in spectra[:2]]
    chosen = [item.target for item in plots.select_spectra(spectra)]
    assert chosen == [f"layers.{i}.self_attn.qk" for i in (0, 10, 19, 29)] + [
        f"layers.{i}.self_attn.vo" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("target", "layer", "role"),
    [
        ("layers.3.mlp.gate_up", 3, "mlp.gate_up"),
        ("model.layers.12.mlp.experts.7.down", 12, "mlp.experts.*.down"),
        ("lm_head", None, "lm_head"),
        ("layers.4", 4, "layers"),
    ],
)
def test_targets_split_into_layer_and_role(target: str, layer: int | None, role: str) -> None:
    assert split_target(target) == (layer, role)


def test_findings_inside_a_group_belong_to_it() -> None:
    group, other = matrix_groups(
        [
            Finding("layers.0.qk", Outcome.APPLIED, "", 1000, 600, 0.1, {"rank": [4, 6]}),
            Finding("layers.0.qk.down", Outcome.APPLIED, "", 200, 50, 0.01, {"bits": 4}),
            Finding("layers.0.qk.up", Outcome.APPLIED, "", 400, 200, 0.02, {"bits": 8}),
            Finding("layers.0.qkv", Outcome.SKIPPED, "not planned", 70, 70),
        ]
    )
    assert (group.bytes_before, group.bytes_after) == (1000, 250)
    assert (group.rank, group.errors, group.choices("bits")) == (5.0, (0.1, 0.01, 0.02), (4, 8))
    assert (other.status, other.bytes_before, other.bytes_after) == ("skipped", 70, 70)
    row = matrices_table(group.findings).rows[0]
    assert row[:4] == ("layers.0.qk", "applied", "4-6", "4, 8")


def test_a_skip_without_bytes_takes_them_from_the_next_pass() -> None:
    skipped = Finding("layers.0.qk", Outcome.SKIPPED, "ignored")
    quantized = Finding("layers.0.qk", Outcome.APPLIED, "", 1000, 150, 0.1, {"bits": 4})
    (group,) = matrix_groups([skipped, quantized])
    assert (group.status, group.bytes_before, group.bytes_after) == ("partly", 1000, 150)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (humanize.number(None), "–"),
        (humanize.number(0.0), "0"),
        (humanize.number(22.5), "22.5"),
        (humanize.number(0.012), "0.0120"),
        (humanize.number(0.000406), "4.06e-4"),
        (humanize.number(1e-4), "1e-4"),
        (humanize.number(123456.7), "123,457"),
        (humanize.number(1.234e9), "1.23e9"),
        (humanize.number(float("inf")), "inf"),
        (humanize.count(576), "576"),
        (humanize.count(134_515_008), "135 M"),
        (humanize.size(999), "999 B"),
        (humanize.size(999_960), "1.00 MB"),
        (humanize.size(538_060_032), "538 MB"),
        (humanize.share(1, 8), "12.5 %"),
        (humanize.share(1, 1), "100 %"),
        (humanize.share(1, 0), "–"),
        (humanize.duration(0.085), "85.0 ms"),
        (humanize.duration(59.96), "1 min 00 s"),
        (humanize.duration(200), "3 min 20 s"),
        (humanize.duration(3901), "1 h 05 min"),
        (humanize.ranges([3, 0, 1, 2, 7]), "0-3,7"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected
