# SPDX-License-Identifier: LGPL-2.1-or-later
"""`ci/run demo`: one guest, saved and brought back, by stock QEMU and by us."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import qemus
from tests.support.redisclient import keys_for
from tests.support.vm import Vm

MEMORY = 1024  # MiB
VALUES = 200  # MiB in redis
TOOL = Path(sys.executable).parent / "qemu-pagesaver"


def say(text: str) -> None:
    print(f"\n-- {text}", flush=True)


def pagesaver(*arguments: str) -> str:
    """Run the tool as a user would, and show the command."""
    print("   $ qemu-pagesaver " + " ".join(arguments), flush=True)
    command = [str(TOOL), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prove(vm: Vm, nonce: str, booted: str, count: int) -> None:
    """Fail unless the guest is the one that was saved, with all it knew."""
    with vm.redis() as redis:
        assert redis.get("nonce") == nonce.encode(), "the nonce is gone"
        assert redis.dbsize() == count + 1, "keys are missing"
        redis.check(range(0, count, 97))
    found = vm.shell.run("cat /proc/sys/kernel/random/boot_id")
    assert found == booted, "the guest was rebooted, not restored"


def answer(vm: Vm, start: float) -> tuple[float, float]:
    """Seconds until redis answered, and QEMU's memory at that moment, in MiB."""
    with vm.redis():
        return time.monotonic() - start, vm.memory_bytes() / 2**20


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="psdemo-", dir="/var/tmp"))
    try:
        run(directory)
    finally:
        shutil.rmtree(directory)


def run(directory: Path) -> None:
    qemu = qemus.get()
    snapshot, stream = directory / "guest.psnap", directory / "guest.stream"
    nonce, count = secrets.token_hex(16), keys_for(VALUES)
    rows = []
    with Vm(qemu, "redis", memory=MEMORY) as vm:
        say(f"A Debian guest with redis boots ({MEMORY} MiB, no KVM)")
        vm.start()
        say(f"It gets {VALUES} MB of values and a nonce that only its memory knows")
        with vm.redis() as redis:
            redis.load(count)
            redis.set("nonce", nonce)
        booted = vm.shell.run("cat /proc/sys/kernel/random/boot_id")
        say("Save it with qemu-pagesaver; the guest goes on")
        saved = json.loads(
            pagesaver(
                *("save", "--json", "--disks", "none"),
                *("--qmp", str(vm.qmp_path), "-o", str(snapshot)),
            )
        )
        say("Save it as QEMU does")
        vm.save_stream(stream)
        vm.qmp.command("cont")
        vm.qmp.wait_status("running")

    say("Restore with stock QEMU")
    with Vm(qemu, "redis", memory=MEMORY, incoming=True) as vm:
        vm.start()
        vm.qmp.events.clear()
        start = time.monotonic()
        vm.qmp.command("migrate-incoming", uri=f"exec:cat '{stream}'")
        vm.qmp.event("RESUME")
        running = time.monotonic() - start
        replied, memory = answer(vm, start)
        prove(vm, nonce, booted, count)
        sent = str(MEMORY * 256)
        rows.append(("stock QEMU", running, replied, memory, sent, stream))

    say("Restore on demand, in a second QEMU, with qemu-pagesaver")
    with Vm(qemu, "redis", memory=MEMORY, incoming=True) as vm:
        vm.start()
        vm.qmp.events.clear()
        attach = ("restore", str(snapshot), "--attach", str(vm.qmp_path), "--json")
        print("   $ qemu-pagesaver " + " ".join(attach), flush=True)
        with subprocess.Popen(
            [str(TOOL), *attach], stdout=subprocess.PIPE, text=True
        ) as restore:
            vm.qmp.event("RESUME")
            start = time.monotonic()
            replied, memory = answer(vm, start)
            prove(vm, nonce, booted, count)
            text, _ = restore.communicate(timeout=300)
        document = json.loads(text)
        assert document["complete"], document
        prove(vm, nonce, booted, count)
        running = document["time-to-running"]
        pages = document["pages-sent"]
        asked = pages["requested"] + pages["prefetched"]
        sent = f"{asked} on demand + {pages['background'] + pages['working-set']} later"
        rows.append(
            ("qemu-pagesaver", running, running + replied, memory, sent, snapshot)
        )

    say("The same guest both times: nonce, boot id and every key looked at are right")
    print(
        f"   saved: {saved['pages']}, guest stopped for {saved['downtime']:.2f} s\n\n"
        f"{'':16}{'running':>10}{'answers':>10}{'QEMU then':>12}{'file':>10}"
        "  pages sent"
    )
    for name, running, replied, memory, sent, file in rows:
        size = file.stat().st_size / 2**20
        print(
            f"{name:16}{running:8.2f} s{replied:8.2f} s{memory:8.0f} MiB"
            f"{size:6.0f} MiB  {sent}"
        )


if __name__ == "__main__":
    main()
