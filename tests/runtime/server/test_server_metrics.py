"""`/metrics`: read by Prometheus' own parser, compared with what was asked."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from serving import Running, serving, write_decoder

from rk_export.runtime.engine import EngineOptions

BODY = {"model": "tiny", "prompt": "The harbour", "max_tokens": 5, "temperature": 0}


def figures(server: Running) -> dict[tuple[str, str], float]:
    """Return every sample by its name and the value of its first label that is no bucket's."""
    text = server.get("/metrics").text
    return {
        (sample.name, "/".join(value for key, value in sample.labels.items() if key != "le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_figures_are_those_of_what_was_asked(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny")
    with serving({"tiny": folder}, engine=EngineOptions(slots=4, queue=4)) as server:
        for _ in range(3):
            assert server.post("/v1/completions", BODY).status_code == 200
        assert server.post("/v1/completions", {**BODY, "stream": True}).status_code == 200
        assert server.post("/v1/completions", {**BODY, "n": 0}).status_code == 400
        assert server.get("/nowhere/at/all").status_code == 404
        found = figures(server)
        assert found["rk_export_http_requests_total", "/v1/completions/200"] == 4
        assert found["rk_export_http_requests_total", "/v1/completions/400"] == 1
        assert found["rk_export_http_requests_total", "other/404"] == 1
        assert found["rk_export_request_seconds_count", "/v1/completions"] == 5
        assert found["rk_export_requests_taken_total", "tiny"] == 4
        assert found["rk_export_generated_tokens_total", "tiny"] == 20
        assert found["rk_export_prompt_tokens_total", "tiny"] == 48
        assert found["rk_export_answers_total", "tiny/length"] == 4
        assert found["rk_export_time_to_first_token_seconds_count", "tiny"] == 4
        assert found["rk_export_inter_token_seconds_count", "tiny"] > 4
        assert found["rk_export_slots", "tiny"] == 4
        assert found["rk_export_model_loaded", "tiny"] == 1
        assert found["rk_export_model_bytes", "tiny"] > 0
        assert found["process_resident_memory_bytes", ""] > 1e6
        assert not any(name.endswith("_created") for name, _ in found)


def test_an_autoscaler_sees_the_queue(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    folder = write_decoder(tmp_path / "tiny")
    with serving({"tiny": folder}, engine=EngineOptions(slots=2, queue=8)) as server:
        assert figures(server)["rk_export_load", "tiny"] == 0
        with ThreadPoolExecutor(6) as clients, server.held():
            for _ in range(6):
                clients.submit(server.post, "/v1/completions", BODY)
            server.until(lambda: figures(server)["rk_export_load", "tiny"] == 3)
            found = figures(server)
            waiting, running = (
                found[f"rk_export_requests_{kind}", "tiny"] for kind in ("waiting", "running")
            )
            assert waiting + running == 6
        server.until(lambda: figures(server)["rk_export_load", "tiny"] == 0)
