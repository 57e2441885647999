"""The invariants, asked of Postgres, of storage, of the receiver and of what customers were told, once all is quiet.

Each yields sentences about what breaks it; none is what is hoped for. Numbers as in docs/reliability.md.
"""

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from app.core.manifest import Manifest
from app.jobs.life import MOVES, TERMINAL
from app.models import JobState
from bench.chaos.house import House
from bench.chaos.ledger import Ledger
from bench.chaos.toy_trainer import STEPS_PER_EPOCH, WEIGHTS, sha256_after

Broken = Iterator[str]
CLAIMED_WITHIN_SECONDS = 5.0
BEGUN = re.compile(r"Training (?:started|resumed at step (\d+))")
ENTERED = (  # which state a message tells of
    ("Created fine-tuning job", JobState.VALIDATING_FILES),
    ("Files validated", JobState.QUEUED),
    ("The job was resumed", JobState.QUEUED),
    ("A worker has taken the job", JobState.RUNNING),
    ("The job was paused", JobState.PAUSED),
    ("The job was cancelled", JobState.CANCELLED),
    ("The job has successfully completed", JobState.SUCCEEDED),
)
REQUEUED = ("the job goes on from its last checkpoint", "the job goes on elsewhere from its last checkpoint")


class Checks:
    def __init__(self, house: House, ledger: Ledger) -> None:
        self._house, self._ledger = house, ledger
        self.jobs = {job["id"]: job for job in house.rows("SELECT * FROM jobs ORDER BY id")}
        self._events = defaultdict[str, list[dict[str, Any]]](list)
        for event in house.rows("SELECT job_id, sequence, type, level, message, data FROM job_events ORDER BY job_id, sequence"):
            self._events[event["job_id"]].append(event)

    def all(self) -> dict[str, list[str]]:
        return {name: list(check(self)) for name, check in CHECKS.items()}

    def kept_promises(self) -> Broken:
        known = {row["id"]: row for row in self._house.rows("SELECT id, storage_key, status FROM files")}
        storage = self._house.storage()
        given_up = {entry["id"] for entry in self._ledger.all("deleting")}
        for file in self._ledger.all("file"):
            if file["id"] in given_up:
                continue
            row = known.get(file["id"])
            if row is None or storage.sha256_of(row["storage_key"]) != file["sha256"]:
                yield f"the file {file['id']} is lost"
            elif row["status"] != "processed":
                yield f"the file {file['id']} is {row['status']}"
        asked = {entry["id"] for entry in self._ledger.all("cancelled")}
        for entry in self._ledger.all("job"):
            job = self.jobs.get(entry["id"])
            if job is None:
                yield f"the job {entry['id']} is lost"
            elif job["state"] != "succeeded" and not (job["state"] == "cancelled" and job["id"] in asked):
                yield f"the job {job['id']} ended {job['state']}: {job['error']}"
        for entry in self._ledger.all("ended"):
            if self.jobs[entry["id"]]["state"] != entry["status"]:
                yield f"{entry['id']} was told to have ended {entry['status']} and is {self.jobs[entry['id']]['state']}"

    def one_model(self) -> Broken:
        finals = Counter(row["job_id"] for row in self._house.rows("SELECT job_id FROM adapters WHERE step IS NULL"))
        for job in self.jobs.values():
            is_done = job["state"] == "succeeded"
            if finals[job["id"]] != is_done or (job["result_file_id"] is not None) != is_done:
                yield f"{job['id']} is {job['state']} with {finals[job['id']]} models"

    def leased(self) -> Broken:
        for job in self.jobs.values():
            if (job["state"] == "running") != (job["lease_owner"] is not None):
                yield f"{job['id']} is {job['state']} and held by {job['lease_owner']}"

    def attempts(self) -> Broken:
        """Steps are told one after another from where the attempt began: a word of an attempt before would stand out."""
        for job_id, told in self._events.items():
            attempt, step = 0, -1
            for event in told:
                message = event["message"]
                if message.startswith("A worker has taken the job"):
                    attempt, step = attempt + 1, -1
                    if attempt > 1 and not message.endswith(f"(attempt {attempt})"):
                        yield f"{job_id}: {message} is no attempt {attempt}"
                elif begun := re.match(r"Training (?:started|resumed at step (\d+))", message):
                    step = int(begun[1] or 0)
                elif event["type"] == "metrics":
                    if event["data"]["step"] != step + 1:
                        yield f"{job_id}: step {event['data']['step']} follows {step} in attempt {attempt}"
                    step = event["data"]["step"]
            if attempt != self.jobs[job_id]["attempt"]:
                yield f"{job_id}: {attempt} claims, attempt {self.jobs[job_id]['attempt']}"

    def moves(self) -> Broken:
        for job_id, told in self._events.items():
            states = [state for event in told if (state := _entered(event["message"]))]
            if not states or states[-1] != self.jobs[job_id]["state"]:
                yield f"{job_id} is {self.jobs[job_id]['state']}, and its events end with {states[-1:]}"
            for before, after in itertools.pairwise(states):
                if after not in MOVES[before]:
                    yield f"{job_id} went from {before} to {after}"
            if self.jobs[job_id]["state"] not in TERMINAL:
                yield f"{job_id} has not ended: {self.jobs[job_id]['state']}"

    def resumes(self) -> Broken:
        for job_id, told in self._events.items():
            kept = 0
            for event in told:
                if saved := re.match(r"Checkpoint saved at step (\d+)", event["message"]):
                    kept = int(saved[1])
                elif (begun := BEGUN.match(event["message"])) and int(begun[1] or 0) != kept:
                    yield f"{job_id} went on from step {begun[1] or 0}, and its last checkpoint was of step {kept}"
            highest = max((event["data"]["step"] for event in told if event["type"] == "metrics"), default=0)
            if self.jobs[job_id]["step"] < highest:
                yield f"{job_id} says step {self.jobs[job_id]['step']}, and has told of {highest}"

    def artifacts(self) -> Broken:
        storage = self._house.storage()
        expected = {row["storage_key"] for row in self._house.rows("SELECT storage_key FROM files")}
        for adapter in self._house.rows("SELECT name, prefix, digest FROM adapters"):
            manifest = Manifest.model_validate_json(storage.get(f"{adapter['prefix']}/manifest.json"))
            expected.add(f"{adapter['prefix']}/manifest.json")
            if manifest.digest != adapter["digest"]:
                yield f"the manifest of {adapter['name']} is another"
            for name, entry in manifest.files.items():
                expected.add(f"{adapter['prefix']}/{name}")
                if storage.sha256_of(f"{adapter['prefix']}/{name}") != entry.sha256:
                    yield f"{name} of {adapter['name']} is damaged"
        for key in storage.list_keys("orgs/"):
            if key not in expected and re.search("/(jobs|files)/", key):
                yield f"nobody knows of {key}"

    def weights(self) -> Broken:
        storage = self._house.storage()
        for job in self.jobs.values():
            if job["state"] != "succeeded":
                continue
            (adapter,) = self._house.rows("SELECT prefix FROM adapters WHERE job_id = %s AND step IS NULL", job["id"])
            steps = job["spec"]["n_epochs"] * STEPS_PER_EPOCH
            expected = sha256_after(seed=job["seed"], dataset_sha256=job["datasets"]["training"]["sha256"], steps=steps)
            if hashlib.sha256(storage.get(f"{adapter['prefix']}/{WEIGHTS}")).hexdigest() != expected:
                yield f"the weights of {job['id']} differ after {job['attempt']} attempts"

    def events(self) -> Broken:
        for job in self.jobs.values():
            if [event["sequence"] for event in self._events[job["id"]]] != list(range(1, job["event_count"] + 1)):
                yield f"the events of {job['id']} have a gap"

    def followed(self) -> Broken:
        """By clients who came back after each break: what they were told without a gap is all that there was."""
        for entry in self._ledger.all("followed"):
            if entry["is_done"] and entry["count"] != self.jobs[entry["id"]]["event_count"]:
                yield f"{entry['count']} of {self.jobs[entry['id']]['event_count']} events of {entry['id']} were streamed"

    def webhooks(self) -> Broken:
        came = defaultdict[str, list[dict[str, Any]]](list)
        for entry in self._ledger.all("webhook"):
            came[entry["id"]].append(entry)
        deliveries = self._house.rows("SELECT id, event_type, body, delivered_at, attempts FROM webhook_deliveries")
        for delivery in deliveries:
            digest = hashlib.sha256(delivery["body"].encode()).hexdigest()
            if delivery["delivered_at"] is None:
                yield f"{delivery['id']} was not delivered in {delivery['attempts']} attempts"
            elif not any(entry["is_taken"] for entry in came[delivery["id"]]):
                yield f"{delivery['id']} is said to be delivered, and never came"
            if any(entry["sha256"] != digest or not entry["is_genuine"] for entry in came[delivery["id"]]):
                yield f"{delivery['id']} came with other bytes or a wrong signature"
        if unknown := came.keys() - {delivery["id"] for delivery in deliveries}:
            yield f"nobody sent {sorted(unknown)[:5]}"
        told = Counter((_data_id(delivery["body"]), delivery["event_type"].rpartition(".")[2]) for delivery in deliveries)
        for job in self.jobs.values():
            if told[job["id"], job["state"]] != 1 or told[job["id"], "started"] != job["attempt"]:
                yield f"of {job['id']} {told[job['id'], job['state']]} ends and {told[job['id'], 'started']} starts were told"

    def cancelled(self) -> Broken:
        for entry in self._ledger.all("cancelled"):
            if self.jobs[entry["id"]]["state"] != "cancelled":
                yield f"{entry['id']} was cancelled and is {self.jobs[entry['id']]['state']}"

    def claims(self) -> Broken:
        for entry in self._ledger.all("probe"):
            if entry["seconds"] > CLAIMED_WITHIN_SECONDS:
                yield f"{entry['id']} waited for {entry['seconds']:.1f} s while all workers were idle"

    def keys(self) -> Broken:
        made = Counter(job["user_metadata"]["mark"] for job in self.jobs.values() if job["user_metadata"])
        for mark, count in made.items():
            if count > 1:
                yield f"{count} jobs of one request {mark}"

    def riddles(self) -> Broken:
        """That a file is not there is the right answer to whoever has deleted it before."""
        deleted = set[str]()
        for entry in self._ledger:
            if entry["kind"] == "deleting":
                deleted.add(entry["id"])
            elif entry["kind"] == "riddle":
                missing = re.search("404 - the file '([^']+)' does not exist", entry["error"])
                if missing is None or missing[1] not in deleted:
                    yield f"{entry['what']}: {entry['error']}"

    def lost_steps(self) -> list[int]:
        """Of each resume, the steps that were told before and are computed again."""
        lost = []
        for told in self._events.values():
            step = 0
            for event in told:
                if begun := BEGUN.match(event["message"]):
                    lost.append(step - int(begun[1] or 0))
                    step = int(begun[1] or 0)
                elif event["type"] == "metrics":
                    step = event["data"]["step"]
        return [count for count in lost if count > 0]


CHECKS: dict[str, Callable[[Checks], Broken]] = {
    "nothing that a customer was promised is lost": Checks.kept_promises,
    "I1 one success, one model": Checks.one_model,
    "I2 running means leased": Checks.leased,
    "I3 attempts grow, and the old ones write nothing": Checks.attempts,
    "I4 ends are final, moves legal": Checks.moves,
    "I5 steps never fall, resumes start at the last checkpoint": Checks.resumes,
    "I6 what is published is whole, and nothing else is left": Checks.artifacts,
    "I6b the weights are those of an undisturbed run": Checks.weights,
    "I7 events without a gap": Checks.events,
    "I7b streams of events without a gap or a double": Checks.followed,
    "I8 every webhook arrived, with the same bytes": Checks.webhooks,
    "I10 what was cancelled did not succeed": Checks.cancelled,
    "I11 who waits is claimed soon": Checks.claims,
    "I12 one key, one job": Checks.keys,
    "no answer was a riddle": Checks.riddles,
}


def _entered(message: str) -> JobState | None:
    if any(said in message for said in REQUEUED):
        return JobState.QUEUED
    return next((state for said, state in ENTERED if message.startswith(said)), None)


def _data_id(body: str) -> str:
    found = re.search(r'"data": ?\{"id": ?"([^"]+)"', body)
    assert found, body
    return found[1]
