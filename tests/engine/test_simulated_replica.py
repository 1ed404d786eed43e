"""The fleet simulation's replica against a real engine: the same requests, step by step."""

from dataclasses import replace

import pytest
from vllm import SamplingParams

from benchmarks.fleet_simulation.replica import IN_FLIGHT_TOKENS, Job, SimulatedReplica
from benchmarks.fleet_simulation.trace import Clock, Pool
from tests.engine.conftest import BLOCK
from triattention.bounds import blocks_bound
from triattention.config import CompressionConfig

CONFIG = CompressionConfig.model_validate(
    {"budget": 64, "interval": 64, "window": 16, "policy": "random", "reserve_growth": False}
)
STEP = 1.0


class _Ignored:
    def finished(self, job: Job, now: float) -> None: ...

    def gave_up(self, job: Job, now: float) -> None: ...


def simulated(pool: Pool, jobs: list[Job]) -> SimulatedReplica:
    """Every step takes one second, so that the middle of step n is at n - 0.5 s."""
    replica = SimulatedReplica(pool, Clock(STEP, 0.0, 0.0), float("inf"), False, _Ignored())
    for job in jobs:
        replica.arrive(job, 0.0)
    return replica


@pytest.mark.parametrize("blocks", [160, 20], ids=["ample", "tight"])
def test_blocks_held_and_preemptions_follow_the_engine(engine, blocks):
    """Ample: the blocks of every request at every step. Tight: until a first preemption, and that it happens then."""
    sizes = [(5, 300), (37, 260), (70, 200), (101, 280), (20, 150)]
    llm = engine(CONFIG, blocks=blocks + 1, max_num_batched_tokens=512, max_model_len=512, enable_prefix_caching=False)
    core = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    preempted_before = scheduler.preemptions
    jobs = [Job(number, 0.0, prompt, output, output) for number, (prompt, output) in enumerate(sizes)]
    for number, (prompt, output) in enumerate(sizes):
        core.add_request(
            str(number),
            {"prompt_token_ids": list(range(1, prompt + 1))},
            SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False),
        )
    pool = Pool(1.0, blocks, BLOCK, CONFIG, max_num_seqs=8, max_num_batched_tokens=512)
    replica = simulated(pool, [replace(job) for job in jobs])
    highest = dict.fromkeys(range(len(sizes)), 0)
    step = 0
    while core.has_unfinished_requests():
        core.step()
        step += 1
        middle = (step - 0.5) * STEP
        while replica.wake is not None and replica.wake < middle:
            replica.turn()
        if replica.preemptions or scheduler.preemptions > preempted_before:
            break
        # What ended in this step has given its blocks back already; the simulated one does so when the step ends.
        real = {int(r.split("-")[0]): held for r, held in scheduler.held_blocks().items()}
        mine = {int(r): held for r, held in replica.held_blocks(middle)[0].items()}
        assert {r: mine[r] for r in real} == real, step
        for number, held in real.items():
            highest[number] = max(highest[number], held)
    if blocks == 20:
        assert replica.preemptions == scheduler.preemptions - preempted_before > 0
        while core.has_unfinished_requests():
            core.step()
        while replica.wake is not None:
            replica.turn()
        assert replica.requests == 0
    else:
        assert step == max(output for _, output in sizes)
        for number, (prompt, output) in enumerate(sizes):
            assert highest[number] == blocks_bound(prompt, prompt + output, BLOCK, CONFIG, IN_FLIGHT_TOKENS)
