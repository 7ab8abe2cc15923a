"""The deployment of Ray Serve, where Ray is installed: two replicas share the requests."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[serve]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PORT = 8123


@pytest.fixture
def address(monkeypatch):
    from ray import serve

    monkeypatch.setenv("LATENTDIFF_TOKEN", "secret")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=10**8, runtime_env={"env_vars": environment})
    try:
        from configs.serve.deployment import app

        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(app)
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_replicas_share_the_requests(address):
    headers = {"Authorization": "Bearer secret"}

    def ask(seed: int) -> int:
        body = {"prompt": "a red car", "seed": seed, "steps": 3}
        return requests.post(f"{address}/v1/images/generations", json=body, headers=headers, timeout=300).status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(8))) == {200}
    assert requests.get(f"{address}/v1/models", timeout=60).status_code == 401
    made = Counter()
    for _ in range(30):  # the metrics of whichever replica answers
        text = requests.get(f"{address}/metrics", headers=headers, timeout=60).text
        made[next((line.split()[-1] for line in text.splitlines() if 'outcome="made"} ' in line), "0")] += 1
    assert sum(map(float, made)) in (8.0, 4.0), f"made by each: {made}"
