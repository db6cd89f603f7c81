"""RL runs with a real server: what listens, who is let in, and how such a run ends. Three servers' starts in all."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest
from faults.runs import run
from ports import free_port
from small_run import SMALL

pytestmark = pytest.mark.faults

RL = ["train", *SMALL]
ROUTES = ["/health", "/metrics", "/weight_info", "/v1/models", "/openapi.json", "/log_probs"]
POSTED = ["/collective_rpc", "/update_weights", "/sleep", "/pause", "/rlad/sample", "/v1/completions", "/log_probs"]


def listening(process):
    """(address, port, process) of every listening socket of a process and all that it started."""
    found = []
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # it has just ended
            name = " ".join(member.cmdline())[:80]
            for connection in member.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((connection.laddr.ip, connection.laddr.port, name))
    return found


def speaks_http(url):
    """Torch's store and gloo do not: they say nothing."""
    try:
        httpx.get(url, timeout=20)
    except httpx.HTTPError:
        return False
    return True


def test_what_an_evaluation_listens_on(tmp_path):
    found = set()
    with run(tmp_path, "evaluated", f"rollout.port={free_port()}", verb=["evaluate", *SMALL]) as evaluated:
        while evaluated.process.poll() is None:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                found |= {address for address, *_ in listening(psutil.Process(evaluated.process.pid))}
            time.sleep(0.1)
        assert evaluated.end()[0] == 0 and evaluated.left() == []
    assert "127.0.0.1" in found and found <= {"127.0.0.1", "::1"}


@pytest.mark.timeout(1200)
def test_what_listens_and_how_a_run_that_is_told_to_stop_goes_on(tmp_path):
    words = [f"rollout.port={free_port()}", "teacher.ranks_per_node=1", "checkpoint.every=0"]
    with run(tmp_path, "told", *words, "train.steps=1000", "train.stop_grace_s=0", verb=RL) as told:
        told.wait_for_step(1)
        found = listening(psutil.Process(told.process.pid))
        assert len(found) >= 3 and {address for address, *_ in found} <= {"127.0.0.1", "::1"}, found
        urls = sorted({f"http://{address}:{port}" for address, port, _ in found})
        with ThreadPoolExecutor(len(urls)) as pool:
            served = [url for url, speaks in zip(urls, pool.map(speaks_http, urls), strict=True) if speaks]
        assert len(served) == 2, served  # the server and the teacher
        for url in served:
            for method, routes in (("GET", ROUTES), ("POST", POSTED)):
                for route in routes:
                    for secret in ({}, {"Authorization": "Bearer x"}):
                        answer = httpx.request(method, url + route, headers=secret, timeout=60)
                        assert answer.status_code == 401, (url, method, route, answer.status_code)
        told.process.send_signal(signal.SIGTERM)
        code, out, err = told.end()
        assert code == 143 and "Traceback" not in out + err
        step = told.metrics()[-1]["step"]
        assert err.splitlines()[-1].startswith(f"rlad: stopped after step {step}; continue with: rlad train ")
        assert told.left() == []
    with run(tmp_path, "told", *words, f"train.steps={step + 1}", "resume=true", verb=RL) as resumed:
        code, out, _ = resumed.end(600)
        assert code == 0 and f"resumed after step {step}" in out
        assert [line["step"] for line in resumed.metrics()] == list(range(step + 2))
        assert resumed.left() == []
