"""Break one line of the package at a time, and see that a fast test fails: `scripts/mutations [WORD ...]`.

Each mutation names a file, a piece of its text that stands there once, what takes its place, and the tests of which
one is to fail. WORDs choose those whose file or name contains one of them. `--check` only looks whether the texts are
still there; the test suite does that too, so a change that moves such a line moves the mutation along. Ends with
status 1 where a mutation survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("torchfedrpc", "tests", "conf", "examples", "scripts", "pyproject.toml", "README.md", "docs", "CHANGELOG.md")
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Mutation:
    """One broken line.

    Attributes:
        name: what the line is for.
        file: where it stands, below ``torchfedrpc``.
        text: the line, or a part of it, as it stands there once.
        broken: what takes its place.
        tests: arguments for pytest, one of whose tests is to fail.
    """

    name: str
    file: str
    text: str
    broken: str
    tests: str

    def applied(self, package: Path) -> str:
        """The file with the line broken.

        Raises:
            LookupError: The text does not stand there exactly once.
        """
        content = (package / self.file).read_text(encoding="utf-8")
        if (count := content.count(self.text)) != 1:
            raise LookupError(f"{self.name}: {self.file} has the text {count} times: {self.text!r}")
        mutated = content.replace(self.text, self.broken)
        compile(mutated, self.file, "exec")
        return mutated


MUTATIONS = [
    # Trust.
    Mutation(
        "forked workers outlive their driver",
        "rpc/fork_server.py",
        "signals or [signal.SIGKILL]",
        "signals",
        "tests/unit/rpc/test_fork_server.py",
    ),
    Mutation("the guard is off", "rpc/world.py", "    guard.install()\n", "", "tests/system/test_members.py"),
    Mutation(
        "the guard lets every global pass",
        "rpc/guard.py",
        "if name in _PLAIN.get(module, ())",
        "if True or name in _PLAIN.get(module, ())",
        "tests/unit/rpc/test_guard.py",
    ),
    Mutation(
        "the guard reads any opcode",
        "rpc/guard.py",
        "            check_opcodes(data)\n",
        "",
        "tests/unit/rpc/test_guard.py",
    ),
    Mutation(
        "the guard gives any attribute",
        "rpc/guard.py",
        "if owner is not pickler or name != _RECEIVER:",
        "if owner is None:",
        "tests/unit/rpc/test_guard.py",
    ),
    Mutation(
        "a request needs no secret",
        "rpc/endpoint.py",
        "hmac.compare_digest(secret, world.secret)",
        "(hmac.compare_digest(secret, world.secret) or True)",
        "tests/unit/rpc/test_endpoint.py",
    ),
    Mutation(
        "a request may come twice",
        "rpc/endpoint.py",
        "    world.requests.check(number)\n",
        "",
        "tests/unit/rpc/test_endpoint.py",
    ),
    Mutation(
        "any module is trusted",
        "wire/allowlist.py",
        "        if _root(module) in self.trusted:\n            return self._find_trusted",
        "        if True:\n            return self._find_trusted",
        "tests/unit/wire/test_allowlist.py",
    ),
    Mutation(
        "names that a trusted module imported travel",
        "wire/allowlist.py",
        "if not isinstance(owner, type) or _root(owner.__module__) != _root(module):",
        "if not isinstance(owner, type):",
        "tests/unit/wire/test_allowlist.py",
    ),
    Mutation(
        "a pickle calls any function that it may name",
        "wire/allowlist.py",
        "            if self.is_trusted(function):\n                return function",
        "            return function",
        "tests/unit/wire/test_allowlist.py tests/unit/wire/test_hostile.py",
    ),
    Mutation(
        "unknown opcodes are read over",
        "wire/scan.py",
        "        else:\n            raise _refusal(head, position)\n        if position > size:",
        "        else:\n            position += 1\n        if position > size:",
        "tests/unit/wire/test_hostile.py",
    ),
    Mutation(
        "any proof of the token will do",
        "rpc/handshake.py",
        'return isinstance(given, str) and hmac.compare_digest(given.encode(errors="replace"), expected.encode())',
        "return isinstance(given, str)",
        "tests/unit/rpc/test_handshake.py",
    ),
    Mutation(
        "the listener asks for no proof",
        "rpc/handshake.py",
        'if not _proves(proof, _proof(token, "dialler", transcript)):',
        "if False:",
        "tests/unit/rpc/test_handshake.py",
    ),
    Mutation(
        "the dialler asks for no proof before it says who it is",
        "rpc/handshake.py",
        'if not _proves((await receive_line(connection)).get("proof"), _proof(token, "listener", transcript)):',
        "if not await receive_line(connection):",
        "tests/unit/rpc/test_handshake.py",
    ),
    Mutation(
        "a token that others can read",
        "rpc/handshake.py",
        "if status.st_mode & 0o077:",
        "if False:",
        "tests/unit/rpc/test_token.py",
    ),
    Mutation(
        "a token that can be guessed",
        "rpc/handshake.py",
        "if len(token) < _MIN_TOKEN_BYTES or len(set(token)) < _MIN_DIFFERENT_BYTES:",
        "if not token:",
        "tests/unit/rpc/test_token.py",
    ),
    Mutation(
        "a worker's exception may end the driver's loop",
        "wire/exceptions.py",
        "if isinstance(rebuilt, BaseException) and not _breaks_loop(rebuilt):",
        "if isinstance(rebuilt, BaseException):",
        "tests/unit/wire/test_exceptions.py",
    ),
    Mutation(
        "a run's folder is open to others",
        "private_files.py",
        "_PRIVATE_FOLDER = 0o700",
        "_PRIVATE_FOLDER = 0o755",
        "tests/unit/test_private_files.py",
    ),
    Mutation(
        "private methods can be called",
        "host/methods.py",
        '    if name.startswith("_"):\n        raise MethodNotFoundError(',
        "    if False:\n        raise MethodNotFoundError(",
        "tests/unit/host/test_methods.py tests/contract/test_errors.py -k 'private or local'",
    ),
    # Values and their order.
    Mutation(
        "tensors are sent as they are",
        "wire/tensors.py",
        "views[index], slot = _lone_slot(tensor, len(slots), copy=copy)",
        "views[index], slot = _lone_slot(tensor, len(slots), copy=False)",
        "tests/unit/wire/test_packing.py tests/contract/test_values.py -k 'not pseudo'",
    ),
    Mutation(
        "local results are not copied",
        "host/process_state.py",
        "pool=self._file_pool) if self.by_value else",
        "pool=self._file_pool) if False else",
        "tests/contract/test_values.py -k local",
    ),
    Mutation(
        "a memory fence does not wait",
        "wire/tensors.py",
        "            torch.cuda.current_stream(device).wait_event(event)\n",
        "            pass\n",
        "tests/unit/rpc/test_devices.py",
    ),
    Mutation(
        "learners of local mode have one gpu",
        "host/learner_host.py",
        "itertools.cycle(self._process.gpus)",
        "itertools.cycle(self._process.gpus[:1])",
        "tests/unit/executors/test_local_gpus.py",
    ),
    Mutation(
        "arguments stay on the driver's gpu",
        "wire/packing.py",
        "self.slots[:] = _moved(self.slots, device)",
        "pass",
        "tests/unit/executors/test_local_gpus.py",
    ),
    Mutation(
        "results stay on the learner's gpu",
        "host/runner.py",
        "result = result.on(job.home)",
        "pass",
        "tests/unit/executors/test_local_gpus.py",
    ),
    Mutation(
        "the last call to come is the next to run",
        "host/mailbox.py",
        "self.current = self.queue.popleft()",
        "self.current = self.queue.pop()",
        "tests/contract/test_calls.py -k local",
    ),
    Mutation(
        "requests run as they come",
        "rpc/endpoint.py",
        "            self._early[number] = action\n",
        "            self._early[self._next] = action\n",
        "tests/unit/rpc/test_in_order.py",
    ),
    Mutation(
        "async steps run beside sync methods",
        "host/process_state.py",
        "or (exclusive and self._num_sharing)",
        "",
        "tests/unit/host/test_method_lock.py",
    ),
    Mutation(
        "a call with an id that is known runs again",
        "host/learner_host.py",
        "            if call.call_id in self._jobs or call.call_id in self._outcomes:\n",
        "            if call.call_id in self._jobs:\n",
        "tests/unit/host/test_learner_host.py",
    ),
    Mutation(
        "an outcome is not kept until it is acknowledged",
        "host/learner_host.py",
        "            self._outcomes[job.call.call_id] = outcome\n",
        "            pass\n",
        "tests/unit/host/test_learner_host.py",
    ),
    Mutation(
        "acknowledged outcomes are kept",
        "host/learner_host.py",
        "acknowledged = [self._outcomes.pop(call_id, None) for call_id in call_ids]",
        "acknowledged = [self._outcomes.get(call_id) for call_id in call_ids]",
        "tests/unit/host/test_learner_host.py",
    ),
    Mutation(
        "the tree of a reduction leans to one side",
        "reduce/tree.py",
        "        while height & 1:  # a right child",
        "        while complete:",
        "tests/unit/reduce/test_tree.py",
    ),
    # Bits.
    Mutation(
        "torch's generator is not seeded",
        "host/randomness.py",
        "        torch.default_generator.manual_seed(seed)\n",
        "",
        "tests/contract/test_random.py -k local",
    ),
    Mutation(
        "python's generator is not seeded",
        "host/randomness.py",
        "        random.seed(seed)\n",
        "",
        "tests/contract/test_random.py -k local",
    ),
    Mutation(
        "all calls of a method have one seed",
        "host/runner.py",
        "number = mailbox.count(call.method) if",
        "number = 0 * mailbox.count(call.method) if",
        "tests/contract/test_random.py -k local",
    ),
    Mutation(
        "all calls of a stateless learner have one number",
        "executors/call_counts.py",
        "method: number + 1}",
        "method: number}",
        "tests/contract/test_stateless.py -k local",
    ),
    Mutation(
        "a checkpoint has the numbers of later calls",
        "executors/call_counts.py",
        "self._at_cut = self._of_clients.copy()",
        "self._at_cut = self._of_clients",
        "tests/unit/executors/test_call_counts.py",
    ),
    Mutation(
        "calls that a late worker gives back go to it again",
        "executors/dealer.py",
        "groups[key] = self._alternating(others or workers), []",
        "groups[key] = self._alternating(workers), []",
        "tests/unit/executors/test_dealer.py",
    ),
    Mutation(
        "a worker whose method ignores its cancellation looks idle",
        "executors/dealer.py",
        "        load.num_stuck += 1\n",
        "        load.num_stuck += 0\n",
        "tests/unit/executors/test_dealer.py",
    ),
    Mutation(
        "no idle worker takes calls",
        "executors/dealer.py",
        "        while idle and worth:\n",
        "        while False:\n",
        "tests/unit/executors/test_dealer.py",
    ),
    Mutation(
        "a client's next call runs beside its method that was cut off",
        "executors/stateless.py",
        "self._dealer.hold(call) if goes_on else None",
        "None",
        "tests/system/test_stateless_workers.py -k call_waits_for_its_method",
    ),
    Mutation(
        "a call that has begun is given back",
        "host/learner_host.py",
        'if not job.has_begun and job.call.kind != "barrier"]',
        'if job.call.kind != "barrier"]',
        "tests/unit/host/test_taking_back.py",
    ),
    Mutation(
        "calls that a worker gives back are forgotten",
        "executors/dealer.py",
        "                one.returned.put_nowait((places, worker))\n",
        "",
        "tests/unit/executors/test_dealt_batches.py -k idle",
    ),
    Mutation(
        "a lost worker's stateless calls wait for it",
        "executors/batches.py",
        "            returned.put_nowait(([place for place in assignment.calls if place in parts], None))\n",
        "            returned.put_nowait(([], None))\n",
        "tests/unit/executors/test_dealt_batches.py -k lost",
    ),
    Mutation(
        "a stateless learner beyond the limit goes to disk",
        "host/learner_cache.py",
        "        if self._spec.stateless:\n",
        "        if False:\n",
        "tests/contract/test_stateless.py -k local",
    ),
    Mutation(
        "a later step of a call does not go on with its streams",
        "host/call_scope.py",
        "                self._own_streams = streams.capture()\n",
        "                pass\n",
        "tests/contract/test_random.py tests/unit/host/test_randomness.py -k 'not pseudo'",
    ),
    # Deadlines and limits.
    Mutation(
        "no method runs too long",
        "host/learner_host.py",
        "            self._process.deadlines.start(job.call.call_id, job.call.run_timeout_s, self._overran)\n",
        "            pass\n",
        "tests/contract/test_run_deadlines.py -k local",
    ),
    Mutation(
        "a call's timeout is not kept",
        "calls.py",
        "return await within(options.timeout_s, answer, late)",
        "return await answer",
        "tests/contract/test_deadlines.py -k local",
    ),
    Mutation(
        "a cancelled method does not see that it is",
        "host/learner_host.py",
        "            job.cancelled = True\n            job.last_item",
        "            job.last_item",
        "tests/contract/test_deadlines.py -k local",
    ),
    Mutation(
        "any number of calls may wait",
        "calls.py",
        "if limit is not None and num_pending >= limit:",
        "if limit is not None and num_pending > limit:",
        "tests/system/test_capacity.py",
    ),
    Mutation(
        "arguments in flight have no limit",
        "executors/admission.py",
        "in_hands + num_bytes <= self._limit_bytes",
        "True",
        "tests/unit/executors/test_admission.py",
    ),
    # The journal.
    Mutation(
        "the journal has no calls",
        "executors/journal.py",
        "        self.entries.append(entry)\n",
        "",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "a call that was cut off is repeated",
        "executors/journal.py",
        "        if outcome.cut_off:\n",
        "        if False:\n",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "a snapshot from before a call that was cut off has what it did",
        "executors/journal.py",
        "return self._cut_off_number > self._snapshot_number",
        "return self._cut_off_number > 0 and not self._has_snapshot",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "a snapshot leaves the journal as it was",
        "executors/journal.py",
        "[entry for entry in self.entries if entry.number > number]",
        "self.entries",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "a snapshot drops the calls that ended after it was taken",
        "executors/journal.py",
        "[entry for entry in self.entries if entry.number > number]",
        "[]",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "a snapshot that comes late takes the place of a newer one",
        "executors/journal.py",
        "            number = max(number, self._snapshot_number)\n",
        "",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "the journal is not bounded in calls",
        "executors/journal.py",
        "return len(self.entries) > self._journals.max_calls",
        "return False",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "a snapshot may free less than its own size",
        "executors/journal.py",
        "return pack(None if is_required else limit)",
        "return pack(None)",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "a large snapshot is taken for few arguments",
        "executors/journal.py",
        "(worth if share >= _WORTH * journal.state_bytes else others)",
        "worth",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "all journals are looked at after each call beyond the bound",
        "executors/journal.py",
        "and self.num_bytes >= self._low_bytes + self._max_bytes // _GROWTH",
        "",
        "tests/unit/executors/test_journal.py",
    ),
    Mutation(
        "any number of snapshots is on its way",
        "executors/snapshot_throttle.py",
        "if self._waiting or not self._budget.fits(self._num_passing):",
        "if False:",
        "tests/unit/executors/test_snapshot_throttle.py",
    ),
    # Sessions of learners.
    Mutation(
        "the last call that waits has the next turn",
        "tasks.py",
        "turn = self._waiting.popleft()",
        "turn = self._waiting.pop()",
        "tests/contract/test_calls.py -k 'pseudo and order'",
    ),
    Mutation(
        "a call whose worker is lost is not made again",
        "executors/session.py",
        "                    self.lose(worker, gone)\n                else:",
        "                    raise WorkerLostError(gone.reason) from gone\n                else:",
        "tests/system/test_recovery.py -k same_bits",
    ),
    Mutation(
        "a rebuild leaves the journal out",
        "executors/learner_session.py",
        "for entry in entries:",
        "for entry in entries[:0]:",
        "tests/system/test_recovery.py -k same_bits",
    ),
    Mutation(
        "a rebuild repeats the journal from its end",
        "executors/learner_session.py",
        "for entry in entries:",
        "for entry in entries[::-1]:",
        "tests/system/test_recovery.py -k left_early",
    ),
    Mutation(
        "a rebuild leaves the snapshot out",
        "executors/learner_session.py",
        "                if reading is not None:\n",
        "                if False:\n",
        "tests/system/test_recovery_journal.py -k since_its_snapshot",
    ),
    Mutation(
        "a rebuild repeats one step of a stream less",
        "executors/learner_session.py",
        "for step in range(1, entry.num_items + (not entry.was_closed)):",
        "for step in range(1, entry.num_items - 1 + (not entry.was_closed)):",
        "tests/system/test_recovery.py -k left_early",
    ),
    Mutation(
        "a call that was cut off is not followed by a snapshot",
        "executors/learner_session.py",
        "if journal.is_due and self.worker is not None:",
        "if False:",
        "tests/system/test_recovery_journal.py -k 'cancelled or deadline'",
    ),
    Mutation(
        "a call behind one that was cut off begins before its snapshot is kept",
        "executors/learner_session.py",
        "            if not is_cut_off:\n",
        "            if True:\n",
        "tests/system/test_recovery_journal.py -k until_its_snapshot",
    ),
    Mutation(
        "a stream whose worker is lost keeps its learner",
        "executors/session.py",
        "            self._session.lose(self._worker, gone)\n        self._give_turn()\n",
        "            self._session.lose(self._worker, gone)\n",
        "tests/unit/executors/test_learner_session.py",
    ),
    Mutation(
        "a call that is made again reports its progress again",
        "executors/session.py",
        "if call.call_id != self._call.call_id or number < self._num_reports:",
        "if call.call_id != self._call.call_id:",
        "tests/system/test_recovery.py -k not_reported_again",
    ),
    Mutation(
        "a learner is given up for losses during the calls of others",
        "executors/learner_session.py",
        "if self._sent_id in gone.running:",
        "if True:",
        "tests/system/test_recovery_limits.py",
    ),
    Mutation(
        "a learner is rebuilt for ever",
        "executors/learner_session.py",
        "elif self._num_losses > self._run.max_recoveries:",
        "elif False:",
        "tests/system/test_recovery_limits.py -k given_up --timeout 30",
    ),
    # Batches of reductions.
    Mutation(
        "the calls of a lost batch are not made again",
        "executors/batches.py",
        "parts[place] for place in calls.keys() & wanted}, gone)\n",
        "parts[place] for place in calls.keys() & wanted}, gone)\n            for place in calls:\n"
        "                parts.pop(place)[1].turns.give()\n",
        "tests/system/test_recovery_reduce.py -k lost_while_its_calls",
    ),
    Mutation(
        "the calls of a lost batch are in the journal before they are made again",
        "executors/batches.py",
        "        for _, session in parts.values():\n            session.lose(worker, gone)\n",
        "        for call, session in parts.values():\n            session.lose(worker, gone)\n"
        '            session._journal.add(call, Outcome("value"))\n',
        "tests/system/test_recovery_reduce.py -k lost_while_its_calls",
    ),
    Mutation(
        "the journal has no calls of batches",
        "executors/batches.py",
        "                session.settle(call, of_call)\n",
        "                session.turns.give()\n",
        "tests/system/test_recovery_reduce.py -k between_two_reductions",
    ),
    Mutation(
        "a batch is sent for ever",
        "executors/batches.py",
        "self.num_losses.update(parts.keys())",
        "self.num_losses.update(())",
        "tests/system/test_recovery_reduce_limits.py -k kills_its_worker",
    ),
    Mutation(
        "a quorum leaves the calls running",
        "reduce/driver.py",
        "            worker.cancel_batch(batch)\n",
        "            pass\n",
        "tests/contract/test_reduce.py tests/contract/test_reduce_runs.py -k 'local or pseudo'",
    ),
    Mutation(
        "a batch that is sent again has the reducer of the first",
        "reduce/worker.py",
        "open_reducer(self.batch.prototype.copy(), self._allow, device)",
        "open_reducer(self.batch.prototype, self._allow, device)",
        "tests/unit/reduce/test_batch_job.py",
    ),
    Mutation(
        "a user's reducer has the learners' own results",
        "reduce/worker.py",
        "        if self._by_value and not self._is_builtin:\n",
        "        if False:\n",
        "tests/unit/reduce/test_batch_job.py",
    ),
    # Arguments that calls share, and files in memory.
    Mutation(
        "a call has an argument as it was at an earlier call of its tick",
        "executors/shared_arguments.py",
        "if _is_unchanged(seen):",
        "if True:",
        "tests/contract/test_sharing.py -k 'local and change'",
    ),
    Mutation(
        "a group call has its arguments packed by each of its calls",
        "executors/call_executor.py",
        "_tick_values(args, kwargs), packed)",
        "_tick_values(args, kwargs), None)",
        "tests/contract/test_groups.py -k 'local and packed_once'",
    ),
    Mutation(
        "a memory file is written while a process reads it",
        "wire/file_pool.py",
        "if not memory_file.has_reader(file.descriptor):",
        "if True:",
        "tests/unit/wire/test_file_pool.py",
    ),
    Mutation(
        "a memory file is kept whose request was not answered",
        "wire/file_pool.py",
        "if file.num_requests or not self._is_usable()",
        "if not self._is_usable()",
        "tests/unit/wire/test_file_pool.py",
    ),
    # Workers and worlds.
    Mutation(
        "a worker leaves before its learners have moved",
        "executors/stateful.py",
        "        await asyncio.gather(*(session.move() for session in moving))\n",
        "",
        "tests/system/test_elastic.py -k 'no_call_is_lost or few_states'",
    ),
    Mutation(
        "the call that a lost worker was running is unknown",
        "rpc/member.py",
        "loss.running if loss.running is not None else list(self.sent)[:1]",
        "loss.running or ()",
        "tests/unit/rpc/test_member.py",
    ),
    # Snapshots and checkpoints.
    Mutation(
        "a snapshot is not compared with the learner",
        "host/snapshot.py",
        "and (found := _difference(snapshot.state, rebuilt, learner, shared)) is not None",
        "and (found := None) is not None",
        "tests/unit/host/test_snapshot.py tests/unit/host/test_state_comparison.py",
    ),
    Mutation(
        "a damaged snapshot is read",
        "host/snapshot.py",
        '        raise SnapshotError("this snapshot is damaged, its checksum differs: take another")\n',
        "        pass\n",
        "tests/unit/host/test_snapshot.py tests/system/test_snapshots.py",
    ),
    Mutation(
        "a snapshot of another learner is taken",
        "host/snapshot.py",
        "    if snapshot.learner != learner:\n",
        "    if False:\n",
        "tests/unit/host/test_snapshot.py tests/system/test_snapshots.py",
    ),
    Mutation(
        "a damaged checkpoint is read",
        "federation/checkpoint_store.py",
        "            if hashlib.sha256(data).digest() == digest:\n",
        "            if True:\n",
        "tests/unit/federation/test_checkpoint_store.py",
    ),
    # What users see.
    Mutation(
        "a group with a deadline starts the slowest first",
        "executors/call_executor.py",
        "return fastest_first(expected) if may_end_early else longest_first(expected)",
        "return longest_first(expected)",
        "tests/unit/executors/test_durations.py tests/contract/test_groups.py -k 'local or durations'",
    ),
    Mutation(
        "a configuration can be set after its checks",
        "config.py",
        "        if self._is_checked:\n",
        "        if False:\n",
        "tests/unit/test_config.py",
    ),
    Mutation(
        "a proxy is called after it was closed",
        "calls.py",
        '        if self.opening.loop is None:\n            raise ConfigError("the proxy is not open',
        '        if False:\n            raise ConfigError("the proxy is not open',
        "tests/contract/test_closing.py -k local",
    ),
    Mutation(
        "a second interface is taken, and not used",
        "rpc/world.py",
        "if _interface not in (None, LOOPBACK, interface):",
        "if False:",
        "tests/system/test_runtime_settings.py",
    ),
    # Callbacks.
    Mutation(
        "exceptions of callbacks are only logged",
        "federation/callback_calls.py",
        'if method == "on_run_start" or not self._named[name].may_fail:',
        "if False:",
        "tests/system/test_callbacks.py",
    ),
    Mutation(
        "callbacks start anew after a resume",
        "federation/saver.py",
        '        self._callbacks.load_state_dict(state["callbacks"])\n',
        "",
        "tests/system/test_callbacks.py",
    ),
    Mutation(
        "a stopped run is not saved",
        "federation/saver.py",
        "is_last = is_last or is_interrupted or",
        "is_last = is_interrupted or",
        "tests/system/test_callbacks.py",
    ),
    # RRefs and the heartbeat.
    Mutation(
        "a worker gives no RRef up",
        "rpc/rrefs.py",
        "            torch_rpc().PyRRef._deserialize(fork)  # an owner",
        "            pass  # an owner",
        "tests/system/test_rrefs.py -k gives_up",
    ),
    Mutation(
        "an RRef names its owner as of the owner's first world",
        "rpc/rrefs.py",
        "data = owner.id, maker, number, forker, fork_number, owner.id,",
        "data = maker, maker, number, forker, fork_number, maker,",
        "tests/system/test_rrefs.py -k next_world",
    ),
    Mutation(
        "a swapped-out worker beats",
        "rpc/heartbeat_process.py",
        'elif state != "D" or worked != had_worked:',
        "elif True:",
        "tests/unit/rpc/test_heartbeat.py",
    ),
    # The command.
    Mutation(
        "any call with a name registers it",
        "experiments/user_modules.py",
        ") if function == kind:",
        "):",
        "tests/system/test_own_methods.py",
    ),
    Mutation(
        "registered names come before config files",
        "experiments/options.py",
        'search_path.append(provider="schema"',
        'search_path.append(provider="registered"',
        "tests/system/test_own_methods.py",
    ),
    Mutation(
        "imports are not trusted",
        "experiments/experiment_config.py",
        "[*runtime.trusted_modules, *imports]",
        "runtime.trusted_modules",
        "tests/system/test_own_methods.py",
    ),
    Mutation(
        "a partition has too few parts",
        "experiments/protocol_checks.py",
        "if len(parts) != num_clients:",
        "if False:",
        "tests/unit/experiments/test_protocols.py",
    ),
    Mutation(
        "a client has no samples",
        "experiments/protocol_checks.py",
        "if not indices.size:",
        "if False:",
        "tests/unit/experiments/test_protocols.py",
    ),
    Mutation(
        "partitions get groups that they do not name",
        "experiments/protocol_checks.py",
        "named.update(_REQUIRED)",
        "named.update(values)",
        "tests/unit/experiments/test_protocols.py",
    ),
    Mutation(
        "a client has less than the minimum",
        "experiments/data/partition.py",
        "ends + min_samples * np.arange",
        "ends + 0 * np.arange",
        "tests/unit/experiments/test_data.py",
    ),
    Mutation(
        "classes are not spread over the clients",
        "experiments/data/partition.py",
        'return np.argsort(places, kind="stable")',
        "return np.argsort(labels)",
        "tests/unit/experiments/test_data.py",
    ),
    Mutation(
        "a client has several groups unasked",
        "experiments/data/partition.py",
        "if num_groups > num_clients and not several_groups:",
        "if False:",
        "tests/unit/experiments/test_data.py",
    ),
    Mutation(
        "damaged files of CIFAR are unpickled",
        "experiments/data/torchvision.py",
        "if not check_integrity(str(path), md5):",
        "if False:",
        "tests/unit/experiments/test_data_sets.py",
    ),
    Mutation(
        "a user of LEAF counts twice",
        "experiments/data/leaf.py",
        "if user in seen:",
        "if False:",
        "tests/unit/experiments/test_data_sets.py",
    ),
    Mutation(
        "loading leaves a thread, and no workers can be forked",
        "experiments/data/hugging_face.py",
        "tqdm.monitor_interval = tqdm.monitor_interval, 0",
        "_ = tqdm.monitor_interval, 0",
        "tests/unit/experiments/test_data_sets.py",
    ),
    Mutation(
        "the aggregate is the new model",
        "federation/cohort_trainer.py",
        "weights = self.step(aggregate)",
        "weights = aggregate",
        "tests/unit/experiments/test_protocols.py",
    ),
    Mutation(
        "top_k forgets what it leaves out",
        "experiments/learners/classification.py",
        'self._residual = rest if compression == "top_k" else {}',
        "self._residual = {}",
        "tests/unit/federation/test_compression.py",
    ),
    Mutation(
        "FedAvg does not weight by samples",
        "federation/cohort_trainer.py",
        'self.setting("weighting") == "uniform"',
        "True",
        "tests/unit/federation/test_algorithms.py",
    ),
    Mutation(
        "a trainer shares the weights that it was given",
        "federation/cohort_trainer.py",
        "None if initial_weights is None else _copied(initial_weights)",
        "initial_weights",
        "tests/unit/federation/test_part_state.py",
    ),
    Mutation(
        "a client that fails in time counts as late",
        "federation/cohort_trainer.py",
        '        if failed and self.setting("on_failure") == "raise":',
        "        if False:",
        "tests/system/test_rounds.py",
    ),
    Mutation(
        "SCAFFOLD's server control counts the cohort as all clients",
        "federation/algorithms/scaffold.py",
        "self.num_results / len(self.learner_proxy.client_ids)",
        "1.0",
        "tests/unit/federation/test_algorithms.py",
    ),
    Mutation(
        "FedNova does not scale by the mean number of steps",
        "federation/algorithms/fednova.py",
        'self.averages["gradient_weight"]',
        "3.0",
        "tests/unit/federation/test_algorithms.py",
    ),
    Mutation(
        "FedBuff does not weight by staleness",
        "federation/algorithms/fedbuff.py",
        "(1 + staleness) ** -0.5",
        "1.0",
        "tests/unit/federation/test_algorithms.py",
    ),
    Mutation(
        "FedBuff goes on if all clients fail",
        "federation/algorithms/fedbuff.py",
        "if num_in_a_row >= len(self.learner_proxy.client_ids):",
        "if num_in_a_row >= 30:",
        "tests/system/test_rounds.py",
    ),
    Mutation(
        "FedBN's personal entries of the global weights drift",
        "federation/algorithms/fedbn.py",
        "{**aggregate, **{name: self.weights[name] for name in self.personal_names()}}",
        "aggregate",
        "tests/unit/experiments/test_learners.py",
    ),
    Mutation(
        "a resume takes another aggregator's settings",
        "federation/part_state.py",
        "if (now := self._settings.get(name)) != was:",
        "if (now := None) is not None:",
        "tests/unit/federation/test_part_state.py",
    ),
    Mutation(
        "what FedNova averages is not robust",
        "federation/results.py",
        "        parts[name] = {key",
        "        parts[name] = results[2][name] if True else {key",
        "tests/unit/federation/test_robust.py",
    ),
    Mutation(
        "the secret noise is drawn anew in each round",
        "federation/privacy.py",
        "if self.seed is None and self._secret is None:",
        "if self.seed is None:",
        "tests/unit/federation/test_privacy.py",
    ),
    Mutation(
        "top_k flattens in the order of the learner",
        "federation/compression.py",
        "for name in received if name in trained and",
        "for name in weights if name in trained and",
        "tests/unit/experiments/test_learners.py",
    ),
    Mutation(
        "shared parameters are named once",
        "experiments/training.py",
        "model.named_parameters(remove_duplicate=False)",
        "model.named_parameters()",
        "tests/unit/experiments/test_learners.py",
    ),
    Mutation(
        "a pool loses exceptions of a checkpoint",
        "pool.py",
        "    return None, astuple(Failure.capture(error))",
        "    return None, None",
        "tests/unit/test_pool.py",
    ),
    Mutation(
        "slow clients are drawn one by one",
        "federation/simulation.py",
        "slow = {clients[number] for number in order[:num_slow]}",
        "slow = {clients[number] for number in order[: num_slow + 1]}",
        "tests/unit/federation/test_cohorts.py",
    ),
    Mutation(
        "changes are not clipped",
        "federation/privacy.py",
        "factor = min(1.0, self.clip_norm / norm) if norm else 1.0",
        "factor = 1.0",
        "tests/unit/federation/test_privacy.py",
    ),
    Mutation(
        "a replaced client counts as one that is left out",
        "federation/privacy.py",
        "dp.GaussianDpEvent(noise_multiplier / 2)",
        "dp.GaussianDpEvent(noise_multiplier)",
        "tests/unit/federation/test_privacy.py",
    ),
    Mutation(
        "a resume starts anew",
        "experiments/commands/resume.py",
        "if not _has_checkpoint(folder / SUBFOLDER):",
        "if False:",
        "tests/system/test_new.py",
    ),
    # Evaluation by clients.
    Mutation(
        "a client trains on its held-out samples",
        "experiments/data/held_out.py",
        "share[~is_held_out], share[is_held_out]",
        "share, share[is_held_out]",
        "tests/unit/experiments/test_evaluation.py",
    ),
    Mutation(
        "learners score the samples that they train on",
        "experiments/learners/classification.py",
        "take(self._scored)",
        "take(self._indices)",
        "tests/unit/experiments/test_evaluation.py",
    ),
    Mutation(
        "clients without samples to score count",
        "federation/client_evaluation.py",
        'result["num_samples"] > 0',
        'result["num_samples"] >= 0',
        "tests/unit/federation/test_client_evaluation.py",
    ),
    Mutation(
        "the worst losses are the lowest",
        "federation/client_evaluation.py",
        "reverse=not _LOWER_IS_WORSE[name]",
        "reverse=False",
        "tests/unit/federation/test_client_evaluation.py",
    ),
    Mutation(
        "the best loss of a comparison is the highest",
        "experiments/sweeps/results.py",
        "key=lambda value: sign * value",
        "key=lambda value: value",
        "tests/unit/experiments/test_sweep_results.py",
    ),
    Mutation(
        "a target that is met exactly is not reached",
        "federation/watched_metric.py",
        "- target) >= 0",
        "- target) > 0",
        "tests/unit/federation/test_metric_callbacks.py",
    ),
]


def survives(mutation: Mutation) -> tuple[bool, float, str]:
    """Whether all of a mutation's tests pass, the seconds that they took, and what pytest said last."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(source, copy / part)
        (copy / "torchfedrpc" / mutation.file).write_text(mutation.applied(copy / "torchfedrpc"), encoding="utf-8")
        command = f"{sys.executable} -m pytest -x -q -n 0 -p no:cacheprovider {mutation.tests}"
        began = time.monotonic()
        try:
            done = subprocess.run(
                command,
                shell=True,
                cwd=copy,
                env={**os.environ, "PYTHONPATH": str(copy)},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return False, TIMEOUT_S, "did not end"
        seconds = time.monotonic() - began
    if done.returncode not in (0, 1):  # neither passed nor failed: no such tests, say
        raise LookupError(f"{mutation.name}: pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
    return done.returncode == 0, seconds, failed[0] if failed else done.stdout.strip().splitlines()[-1]


def main() -> int:
    """Run what the arguments say; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--check", action="store_true", help="only look whether the texts are still there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    chosen = [
        one
        for one in MUTATIONS
        if not arguments.words or any(word in f"{one.file} {one.name}" for word in arguments.words)
    ]
    for mutation in chosen:
        mutation.applied(ROOT / "torchfedrpc")
    if arguments.check:
        print(f"{len(chosen)} mutations find their lines")
        return 0
    survivors = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, (alive, seconds, last) in zip(chosen, pool.map(survives, chosen), strict=True):
            survivors += alive
            said = "SURVIVES" if alive else "fails"
            print(f"{said:8} {seconds:5.0f} s  {mutation.file}: {mutation.name}  [{last}]", flush=True)
    print(f"{len(chosen)} mutations, {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
