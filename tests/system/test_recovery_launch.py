"""Lost ranks of a launch: none takes their place, and their learners go on elsewhere."""

from __future__ import annotations

from pathlib import Path

from torchrun import run_launch, write_script


def test_learners_of_frozen_and_severed_ranks_go_on_elsewhere_and_the_launch_ends_well(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        from learners import Mortal
        from torchfedrpc.events import WorkerLost
        from torchfedrpc.testing import Faults

        CLIENTS = [f"client_{number}" for number in range(6)]

        async def steps(proxy, faults=Faults()):
            results = [dict(await proxy.clients().call("step"))]
            async with faults.injected(proxy):
                for _ in range(2):
                    results.append(dict(await proxy.clients().call("step")))
                processes = set((await proxy.clients().call("process_id")).values())
            return results, processes

        async def main():
            async with tfr.LearnerProxy(Mortal, CLIENTS, runtime="local") as proxy:
                undisturbed, _ = await steps(proxy)
            lost = []
            proxy = tfr.LearnerProxy(Mortal, CLIENTS, runtime={"heartbeat_timeout_s": 2, "journal_max_calls": 1})
            async with proxy:
                first, _ = await steps(proxy)
            async with proxy:
                both = asyncio.Event()

                def on_event(event):
                    if isinstance(event, WorkerLost):
                        lost.append(event.worker)
                        if len(lost) == 2:
                            both.set()

                proxy.subscribe(on_event)
                faults = Faults().freeze("worker1", at_call=2).sever("worker2", at_call=2)
                results, _ = await steps(proxy, faults)
                await both.wait()
                processes = set((await proxy.clients().call("process_id")).values())
            async with proxy:
                again, last = await steps(proxy)
            return first == results == undisturbed == again, sorted(lost), len(processes), last == processes

        if __name__ == "__main__":
            result = tfr.run(main)
            sys.stdout.write(f"result {os.environ['RANK']} {result}\\n")
        """,
    )
    code, output = run_launch(script, num_processes=4)
    assert code == 0, output
    assert "result 0 (True, ['worker1', 'worker2'], 1, True)" in output, output


def test_a_rank_that_is_cut_off_between_two_runs_is_lost_within_the_heartbeat_timeout(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        from torchfedrpc.events import WorkerLost
        from torchfedrpc.testing import Faults

        async def main():
            is_lost = asyncio.Event()
            proxy = tfr.LearnerProxy(Probe, ["a", "b"], runtime={"heartbeat_timeout_s": 2})
            async with proxy, Faults().sever("worker1", at_call=1).injected(proxy):
                await proxy.clients().call("same", 1)
            async with proxy:
                proxy.subscribe(lambda event: isinstance(event, WorkerLost) and is_lost.set())
                async with asyncio.timeout(30):
                    await is_lost.wait()
                return dict(await proxy.clients().call("same", 2))

        if __name__ == "__main__":
            sys.stdout.write(f"result {os.environ['RANK']} {tfr.run(main)}\\n")
        """,
    )
    code, output = run_launch(script)
    assert code == 0, output
    assert "result 0 {'a': 2, 'b': 2}" in output, output
