"""Prometheus metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .supervisor import Supervisor

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    def __init__(self, supervisor: Supervisor):
        self.supervisors, self.registry = [supervisor], (registry := CollectorRegistry())
        self.requests = Counter("llm_requests", "Requests by route and status.", ["route", "status"], registry=registry)
        self.aborted = Counter(
            "llm_aborted", "Generations ended by a client that disconnected or read too slowly.", registry=registry
        )
        self.restarts = Counter("llm_engine_restarts", "Restarts of the engine after a failure.", registry=registry)
        self.first_token = Histogram(
            "llm_time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.duration = Histogram(
            "llm_generation_seconds", "From a request's arrival to the end of its answer.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's figures, read on request."""
        alive = all(one.alive for one in self.supervisors)
        running, waiting, slots, prompt_tokens, generated_tokens, steps = (
            sum(figures)
            for figures in zip(*(dataclasses.astuple(one.stats()) for one in self.supervisors), strict=True)
        )
        yield GaugeMetricFamily("llm_engine_up", "Whether every engine runs.", float(alive))
        yield GaugeMetricFamily("llm_requests_running", "Requests that are being decoded.", running)
        yield GaugeMetricFamily("llm_requests_waiting", "Requests that wait for a slot.", waiting)
        yield GaugeMetricFamily("llm_slots", "Samples that can be decoded at once.", slots)
        yield CounterMetricFamily("llm_prompt_tokens", "Tokens of prompts.", prompt_tokens)
        yield CounterMetricFamily("llm_generated_tokens", "Tokens drawn.", generated_tokens)
        yield CounterMetricFamily("llm_engine_steps", "Steps of the engine.", steps)
