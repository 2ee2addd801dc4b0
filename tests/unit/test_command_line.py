# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recorded command line: secrets, the table, and what is started again."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from qemu_pagesaver import command_line, errors
from qemu_pagesaver.command_line import MARKER, OPTIONS, Plan, record
from qemu_pagesaver.option_string import OptionString

DOCUMENT = Path(command_line.__file__).with_name("COMMAND-LINE.md")
QEMU = "qemu-system-x86_64"
RUN = "/run/x"


@pytest.fixture(autouse=True)
def path_with_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    binary = tmp_path / "bin" / QEMU
    binary.parent.mkdir()
    binary.write_text("#!/bin/false\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    return binary


def plan(*argv: str, **options: Any) -> Plan:
    options.setdefault("qmp_socket", "/run/x/qmp.sock")
    options.setdefault("run_dir", RUN)
    options.setdefault("debug_threads", False)
    return command_line.plan([QEMU, *argv], **options)


def started(*argv: str, **options: Any) -> list[str]:
    """Return the planned arguments without the binary and without our own."""
    arguments = list(plan(*argv, **options).argv[1:])
    return arguments[: arguments.index("-chardev", -7)]


def test_our_own_options_end_the_command_line(path_with_qemu: Path) -> None:
    assert plan("-m", "1G").argv == (
        str(path_with_qemu),
        "-m",
        "1G",
        "-chardev",
        "socket,id=pagesaver-qmp,path=/run/x/qmp.sock,server=on,wait=off",
        "-mon",
        "chardev=pagesaver-qmp,mode=control",
        "-incoming",
        "defer",
    )


def test_paused_guests_get_s_once() -> None:
    assert plan("-S", paused=True).argv.count("-S") == 1
    assert "-S" not in plan("-S").argv


# Each: recorded arguments, started arguments.
KEPT = [
    ["-cpu", "cortex-a57", "-smbios", "type=1,serial=0", "-dtb", "/boot/virt.dtb"],
    ["-m", "1G", "-smp", "2,maxcpus=4", "-cpu", "host,+x2apic", "-accel", "kvm"],
    ["--nodefaults", "-no-reboot"],
    ["-append", "console=ttyS0 password=x,y {z root=/dev/vda"],
    ["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56", "-netdev",
     "user,id=n0,net=10.0.0.0/24"],
    ["-device", '{"driver":"virtio-blk-pci",  "drive":"d0"}'],
    ["-object", "memory-backend-memfd,id=m0,size=1G,share=on"],
    ["-object", "rng-random,id=r,filename=/dev/urandom"],
    ["-serial", "null", "-serial", "chardev:c0", "-monitor", "none"],
    ["-serial", "vc:80Cx24C", "-parallel", "pty"],
    ["-chardev", "ringbuf,id=c0,size=4096"],
    ["-vnc", "none", "-display", "none"],
    ["-nic", "none", "-net", "nic,model=e1000"],
    ["-kernel", "/boot/vmlinuz", "-initrd", "/boot/initrd", "-bios", "bios.bin"],
    ["-device", "e1000,romfile="],
    ["-fw_cfg", "name=opt/a,string=b,,c", "-smbios", "type=1,serial=0"],
    ["-global", "virtio-blk-pci.disable-legacy=on"],
    ["-drive", "if=none,id=cd0,media=cdrom"],
    ["-usbdevice", "tablet", "-snapshot"],
]  # fmt: skip


@pytest.mark.parametrize("argv", KEPT, ids=lambda argv: argv[0])
def test_kept_byte_for_byte(argv: list[str]) -> None:
    result = plan(*argv)
    expected = [argv[0].replace("--", "-"), *argv[1:]]
    assert list(result.argv[1 : 1 + len(argv)]) == expected
    assert result.changes == ()


def test_an_arm_machine() -> None:
    arguments = ["-M", "virt,gic-version=3,highmem=off", "-cpu", "cortex-a57"]
    expected = ["-M", "virt-10.0,gic-version=3,highmem=off", "-cpu", "cortex-a57"]
    assert started(*arguments, machine="virt-10.0") == expected


UNIX = "server=on,wait=off"
REWRITTEN = [
    (["-machine", "q35,accel=kvm"], ["-machine", "pc-q35-10.0,accel=kvm"]),
    (["-M", "type=q35"], ["-M", "type=pc-q35-10.0"]),
    (["-accel", "tcg"], ["-accel", "tcg", "-machine", "pc-q35-10.0"]),
    (["-qmp", "unix:/a,server=on", "-pidfile", "/p", "-daemonize", "-gdb", "tcp::1",
      "-s", "-D", "/log", "-loadvm", "x", "-incoming", "defer"], []),
    (["-serial", "stdio"], ["-serial", f"unix:{RUN}/serial0.sock,{UNIX}"]),
    (["-serial", "mon:stdio"], ["-serial", f"mon:unix:{RUN}/serial0.sock,{UNIX}"]),
    (["-serial", "unix:/s,server,nowait", "-serial", "tcp::9,server=on"],
     ["-serial", f"unix:{RUN}/serial0.sock,{UNIX}",
      "-serial", f"unix:{RUN}/serial1.sock,{UNIX}"]),
    (["-serial", "stdio", "-monitor", "stdio"],
     ["-serial", f"unix:{RUN}/serial0.sock,{UNIX}", "-monitor", "none"]),
    (["-monitor", "telnet::5,server,nowait"],
     ["-monitor", f"unix:{RUN}/monitor0.sock,{UNIX}"]),
    (["-chardev", "socket,id=c,host=0,port=1,server=on,telnet=on,mux=on"],
     ["-chardev", f"socket,id=c,path={RUN}/chardev0.sock,{UNIX},telnet=on,mux=on"]),
    (["-chardev", "stdio,id=c,signal=off"],
     ["-chardev", f"socket,id=c,path={RUN}/chardev0.sock,{UNIX}"]),
    (["-chardev", "socket,id=q,path=/q,server=on", "-mon",
      "chardev=q,mode=control,pretty=on"], []),
    (["-chardev", "socket,id=q,path=/q,server=on", "-mon", "q,mode=control"], []),
    (["-chardev", "socket,id=h,path=/h,server=on", "-mon", "h"],
     ["-chardev", f"socket,id=h,path={RUN}/chardev0.sock,{UNIX}", "-mon", "h"]),
    (["-nographic"], ["-nographic", "-serial", f"unix:{RUN}/serial0.sock,{UNIX}"]),
    (["-nographic", "-serial", "null"], ["-nographic", "-serial", "null"]),
    (["-nographic", "-nodefaults"], ["-nographic", "-nodefaults"]),
    (["-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:22-:22,hostfwd=udp::53-:53"],
     ["-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp::0-:53"]),
    (["-nic", "user,model=e1000,hostfwd=::80-:80"],
     ["-nic", "user,model=e1000,hostfwd=::0-:80"]),
    (["-vnc", ":1,password=on,share=force-shared"],
     ["-vnc", f"unix:{RUN}/vnc0.sock,share=force-shared"]),
    (["-display", "vnc=:1"], ["-display", f"vnc=unix:{RUN}/vnc0.sock"]),
    (["-display", "curses"], ["-display", "none"]),
    (["-spice", f"port=5900,password={MARKER},seamless-migration=on"],
     ["-spice", (f"seamless-migration=on,unix=on,addr={RUN}/spice0.sock,"
                  "disable-ticketing=on")]),
    (["-run-with", "exit-with-parent=on"], []),
    (["-kernel", "vmlinuz"], ["-kernel", "/work/vmlinuz"]),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "expected"), REWRITTEN, ids=str)
def test_rewritten(argv: list[str], expected: list[str]) -> None:
    options: dict[str, Any] = {"cwd": "/work"}
    if expected and "pc-q35-10.0" in "".join(expected):
        options["machine"] = "pc-q35-10.0"
    assert started(*argv, **options) == expected
    changes = plan(*argv, **options).changes
    silent = argv == expected or argv[0] == "-S"
    assert bool(changes) is not silent


def test_json_netdev_moves_its_ports() -> None:
    text = json.dumps({"type": "user", "id": "n", "hostfwd": [{"str": "tcp::22-:22"}]})
    _, new = started("-netdev", text)
    assert json.loads(new) == {
        "type": "user",
        "id": "n",
        "hostfwd": [{"str": "tcp::0-:22"}],
    }


def test_forwarded_ports_of_the_user_replace_the_recorded() -> None:
    argv = ["-netdev", "user,id=n,hostfwd=tcp::22-:22"]
    assert started(*argv, hostfwd=["tcp::2222-:22"]) == [
        "-netdev",
        "user,id=n,hostfwd=tcp::2222-:22",
    ]


def test_endpoints_stay_when_the_first_guest_has_gone() -> None:
    argv = ["-netdev", "user,id=n,hostfwd=tcp::22-:22", "-vnc", ":1", "-spice",
            "port=1"]  # fmt: skip
    assert started(*argv, keep_endpoints=True) == argv
    # ..  but none may keep QEMU waiting for a client.
    assert started("-serial", "tcp::9,server=on", keep_endpoints=True) == [
        "-serial",
        "tcp::9,server=on,wait=off",
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["-serial", "unix:/home/x,server=on,wait=off"],
        ["-chardev", "socket,id=c,path=/home/x,server=on,wait=off"],
        ["-vnc", "unix:/home/x"],
        ["-display", "vnc=unix:/home/x"],
        ["-spice", "unix=on,addr=/home/x"],
        ["-serial", "tcp::1,server=on,wait=off,logfile=/x"],
    ],
    ids=str,
)
def test_listening_sockets_that_stay_replace_files(argv: list[str]) -> None:
    with pytest.raises(errors.NeedsTrust):
        plan(*argv, keep_endpoints=True)
    plan(*argv, keep_endpoints=True, trust=True)
    if "logfile" not in argv[1]:
        plan(*argv)


def test_sockets_are_listed() -> None:
    result = plan("-serial", "stdio", "-vnc", ":1")
    assert result.sockets == {
        "-serial stdio": f"{RUN}/serial0.sock",
        "-vnc :1": f"{RUN}/vnc0.sock",
    }


def test_long_socket_paths_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="107"):
        plan(qmp_socket="/" + "x" * 107)


def test_debug_threads() -> None:
    assert started(debug_threads=True) == ["-name", "debug-threads=on"]
    assert started("-name", "g", debug_threads=True) == ["-name", "g,debug-threads=on"]
    given = ["-name", "guest=g,debug-threads=off"]
    assert started(*given, debug_threads=True) == given
    assert started("-name", "g,process=p", name="h") == ["-name", "h,process=p"]


REFUSED = [
    ["-add-fd", "fd=3,set=2"],
    ["-netdev", "tap,id=n,fd=3"],
    ["-netdev", "tap,id=n,fds=3:4,vhostfds=5:6"],
    ["-netdev", '{"type":"stream","id":"n","addr":{"type":"fd","str":"3"}}'],
    ["-chardev", "socket,id=c,fd=3,server=on"],
    ["-drive", "file=/dev/fdset/2,if=virtio"],
    ["-hda", "/dev/fdset/2"],
    ["-blockdev", '{"driver":"file","filename":"/dev/fdset/2","node-name":"n"}'],
    ["-device", "vhost-vsock-pci,guest-cid=3,vhostfd=7"],
    ["-xen-domid", "1"],
    ["-icount", "shift=1,rr=record,rrfile=x"],
    ["-runas", "nobody"],
    ["-chroot", "/x"],
    ["-run-with", "user=nobody"],
    ["-blockdev", "{"],
    # Not JSON to QEMU, which would see ",file=" in it.
    ["-fw_cfg", '{"a":",file=/etc/shadow,x=","b":1}'],
    ["-chardev", "null,id=c,mux,,logfile=/etc/passwd"],
    ["-drive", "if=none,x,,file=/etc/shadow"],
    ["-object", f"secret,id=s,data={MARKER}"],
    ["-help"],
]


@pytest.mark.parametrize("argv", REFUSED, ids=str)
def test_refused_by_name_even_with_trust(argv: list[str]) -> None:
    with pytest.raises(errors.CommandLineRefused) as caught:
        plan(*argv, trust=True)
    assert argv[0] in caught.value.message


@pytest.mark.parametrize(
    "argv", [["-frobnicate"], ["-enable-kvm=on"], ["-"], ["--"], ["-m"]]
)
def test_unknown_or_incomplete_options_are_named(argv: list[str]) -> None:
    with pytest.raises(errors.CommandLineRefused) as caught:
        plan(*argv, trust=True)
    assert argv[0] in caught.value.message


TRUSTED = [
    ["-netdev", "tap,id=n"],
    ["-netdev", "tap,id=n,script=/tmp/evil"],
    ["-netdev", "bridge,id=n"],
    ["-netdev", "socket,id=n,connect=host:1"],
    ["-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:1-cmd:/bin/sh"],
    ["-netdev", '{"type":"user","id":"n","guestfwd":[{"str":"tcp:1:1-cmd:x"}]}'],
    ["-netdev", "user,id=n,smb=/home"],
    ["-netdev", "user,id=n,tftp=/etc"],
    ["-chardev", "file,id=c,path=/etc/passwd"],
    ["-chardev", "pipe,id=c,path=/tmp/p"],
    ["-chardev", "socket,id=c,path=/run/docker.sock"],
    ["-chardev", "null,id=c,logfile=/etc/passwd"],
    ["-serial", "file:/etc/passwd"],
    ["-serial", "/dev/ttyS0"],
    ["-serial", "tcp:evil:1"],
    ["-debugcon", "file:/x"],
    ["-plugin", "/tmp/evil.so"],
    ["-readconfig", "/tmp/c"],
    ["-virtfs", "local,path=/,mount_tag=x,security_model=none"],
    ["-fsdev", "local,id=x,path=/"],
    ["-object", "memory-backend-file,id=m,size=1G,mem-path=/x"],
    ["-object", "filter-dump,id=f,netdev=n,file=/etc/passwd"],
    ["-object", '{"qom-type":"input-linux","id":"i","evdev":"/dev/input/event0"}'],
    ["-object", "secret,id=s,file=/etc/shadow"],
    ["-mem-path", "/dev/hugepages"],
    ["-device", "vfio-pci,host=01:00.0"],
    ["-device", '{"driver":"usb-host","hostbus":1}'],
    ["-device", "usb-mtp,rootdir=/home"],
    ["-device", "loader,file=/etc/shadow,addr=0"],
    ["-global", "usb-mtp.rootdir=/home"],
    ["-global", "driver=usb-mtp,property=rootdir,value=home"],
    ["-set", "drive.d0.file=/etc/shadow"],
    ["-smbios", "file=/etc/shadow"],
    ["-acpitable", "data=/etc/shadow"],
    ["-fw_cfg", "opt/x,file=/etc/shadow"],
    ["-semihosting"],
    ["-drive", "file=/etc/shadow,format=raw"],
    ["-drive", "file=/dev/sda,format=raw"],
    ["-drive", "file=fat:rw:/home"],
    ["-drive", "file.driver=vvfat,file.dir=/home"],
    ["-drive", 'file=json:{"driver":"file",, "filename":"/etc/shadow"}'],
    ["-drive", "file=ssh://host/disk"],
    ["-blockdev", "driver=file,filename=/etc/shadow,node-name=n"],
    ["-blockdev", "raw,node-name=n,file.driver=file,file.filename=/etc/shadow"],
    ["-blockdev", '{"driver":"nbd","server":{"type":"unix","path":"/s"}}'],
    ["-hda", "/etc/shadow"],
    ["/etc/shadow"],
    ["-pflash", "/etc/shadow"],
    ["-iscsi", "user=x"],
    ["-display", "spice-app"],
    ["-audiodev", "wav,id=a,path=/etc/passwd"],
    ["-accel", "kvm,device=/dev/x"],
    ["-machine", "q35,dumpdtb=x"],
    ["-machine", "q35,firmware=/etc/passwd"],
    ["-drive", "driver=raw,filename=/etc/shadow"],
]


@pytest.mark.parametrize("argv", TRUSTED, ids=str)
def test_needs_trust(argv: list[str]) -> None:
    with pytest.raises(errors.NeedsTrust) as caught:
        plan(*argv)
    assert argv[0] in caught.value.message
    result = plan(*argv, trust=True)
    assert list(result.argv[1 : 1 + len(argv)]) == argv
    assert result.trusted


def test_all_reasons_are_named_at_once() -> None:
    with pytest.raises(errors.NeedsTrust, match=r"-plugin x.*-virtfs y"):
        plan("-plugin", "x", "-virtfs", "y")
    with pytest.raises(errors.CommandLineRefused, match=r"-add-fd.*-chroot"):
        plan("-add-fd", "fd=3,set=1", "-chroot", "/")


# ---------------------------------------------------------------------- disks

DISKS = [
    (["-hda", "a.img"], ["-hda", "/new"]),
    (["a.img"], ["/new"]),
    (["-drive", "file=/d/a.img,if=virtio,format=raw,cache=none"],
     ["-drive", "file=/new,if=virtio,format=qcow2,cache=none"]),
    (["-drive", "if=virtio,file=file:a.img"],
     ["-drive", "if=virtio,file=/new,format=qcow2"]),
    (["-drive", "file=a.img,snapshot=on,driver=raw,if=ide"],
     ["-drive", "file=/new,driver=qcow2,if=ide"]),
    (["-drive", "if=none,id=d,driver=raw,file.driver=file,file.filename=a.img"],
     ["-drive", "if=none,id=d,driver=qcow2,file.driver=file,file.filename=/new"]),
    (["-blockdev", "driver=raw,node-name=n,file.driver=file,file.filename=a.img"],
     ["-blockdev", "driver=qcow2,node-name=n,file.driver=file,file.filename=/new"]),
    (["-blockdev", "driver=file,node-name=p,filename=a.img,aio=native",
      "-blockdev", "driver=raw,node-name=n,file=p,discard=unmap"],
     ["-blockdev", "driver=file,node-name=p,filename=/new,aio=native",
      "-blockdev", "driver=qcow2,node-name=n,file=p,discard=unmap"]),
    (["-blockdev", "driver=file,node-name=p,filename=a.img,read-only=off"],
     ["-blockdev", ("driver=qcow2,node-name=p,file.filename=/new,read-only=off,"
                     "file.driver=file")]),
    (["-blockdev", ("driver=throttle,node-name=t,throttle-group=g,file.driver=qcow2,"
                     "file.file.driver=file,file.file.filename=a.img")],
     ["-blockdev", ("driver=throttle,node-name=t,throttle-group=g,file.driver=qcow2,"
                     "file.file.driver=file,file.file.filename=/new")]),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "expected"), DISKS, ids=str)
def test_overlays_take_the_place_of_disks(argv: list[str], expected: list[str]) -> None:
    result = started(
        *argv, cwd="/d", disk_map={"/d/a.img": "/new"}, known_files={"/d/a.img"}
    )
    assert [_sorted(argument) for argument in result] == [
        _sorted(argument) for argument in expected
    ]


def _sorted(argument: str) -> list[str]:
    return sorted(argument.split(","))


def test_libvirt_style_nodes() -> None:
    storage = {"driver": "file", "filename": "/d/a.qcow2", "node-name": "s1",
               "auto-read-only": True}  # fmt: skip
    disk = {"node-name": "f1", "read-only": False, "driver": "qcow2", "file": "s1",
            "backing": "f2", "l2-cache-size": 1}  # fmt: skip
    arguments = started(
        "-blockdev", json.dumps(storage), "-blockdev", json.dumps(disk),
        disk_map={"/d/a.qcow2": "/new"}, known_files={"/d/a.qcow2"},
    )  # fmt: skip
    assert json.loads(arguments[1]) == storage | {"filename": "/new"}
    del disk["backing"]
    assert json.loads(arguments[3]) == disk


def test_disks_that_stay_get_absolute_names() -> None:
    assert started("-cdrom", "a.iso", cwd="/d", known_files={"/d/a.iso"}) == [
        "-cdrom",
        "/d/a.iso",
    ]


def test_relative_names_need_their_directory() -> None:
    with pytest.raises(errors.CommandLineRefused, match=r"a\.img.*not recorded"):
        plan("-hda", "a.img", trust=True)


def test_raw_parts_cannot_have_overlays() -> None:
    node = "driver=raw,offset=512,node-name=n,file.driver=file,file.filename=/a"
    with pytest.raises(errors.CommandLineRefused, match="offset"):
        plan("-blockdev", node, disk_map={"/a": "/new"}, known_files={"/a"})


def test_an_overlay_of_an_unproved_file_needs_trust() -> None:
    with pytest.raises(errors.NeedsTrust):
        plan("-hda", "/etc/shadow", disk_map={"/etc/shadow": "/new"})


# -------------------------------------------------------------------- binary


def test_recorded_paths_are_not_executed(path_with_qemu: Path, tmp_path: Path) -> None:
    other = tmp_path / QEMU
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    result = command_line.plan([str(other)], qmp_socket="/q", run_dir=RUN)
    assert result.argv[0] == str(path_with_qemu)
    assert "is started instead" in result.changes[0]
    given = command_line.plan([QEMU], qmp_socket="/q", run_dir=RUN, qemu=other)
    assert given.argv[0] == str(other)


@pytest.mark.parametrize("name", ["/bin/sh", "qemu-system-x86_64;x", "", "../x"])
def test_programs_that_are_no_qemu(name: str) -> None:
    with pytest.raises(errors.CommandLineRefused):
        command_line.plan([name], qmp_socket="/q", run_dir=RUN)


def test_qemu_that_is_not_installed() -> None:
    with pytest.raises(errors.CommandLineRefused, match="not in PATH"):
        command_line.plan(["qemu-system-m68k"], qmp_socket="/q", run_dir=RUN)
    with pytest.raises(errors.CommandLineRefused, match="is not there"):
        plan(qemu="/no/such/qemu")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        [QEMU, "-m\0"],
        [QEMU] * 5000,
        [QEMU, "x" * 70000],
        [QEMU, *["y" * 60000] * 20],
    ],
    ids=["empty", "nul", "many", "long", "large"],
)
def test_bounds(argv: list[str]) -> None:
    with pytest.raises(errors.CommandLineRefused):
        command_line.plan(argv, qmp_socket="/q", run_dir=RUN)


def test_messages_are_harmless_to_a_terminal() -> None:
    with pytest.raises(errors.CommandLineRefused) as caught:
        plan("-\x1b[2J" + "x" * 1000)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


def test_hot_plugged_devices_are_judged_as_well() -> None:
    assert started(add_devices=["virtio-balloon-pci,id=b"]) == [
        "-device",
        "virtio-balloon-pci,id=b",
    ]
    with pytest.raises(errors.NeedsTrust):
        plan(add_devices=["vfio-pci,host=0:0"])


def test_random_arguments_give_a_plan_or_one_sentence() -> None:
    rng = random.Random(3)
    alphabet = ',={}":.-[]/' + "abcfile0" + "\x1b\u00e9"
    values = ["socket", "server=on", "file", "filename", "driver", "node-name", "vnc="]
    for _ in range(5000):
        argv = []
        for _ in range(rng.randrange(1, 5)):
            argv.append("-" + rng.choice(list(OPTIONS)))
            argv.append(
                "".join(
                    rng.choice([rng.choice(alphabet), rng.choice(values)])
                    for _ in range(rng.randrange(12))
                )
            )
        with contextlib.suppress(errors.MismatchError):
            result = plan(*argv, trust=rng.random() < 0.5, cwd="/d")
            assert all(isinstance(argument, str) for argument in result.argv)


# ------------------------------------------------------------ recording, table


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-object", "secret,id=s,data=geheim"],
         ["-object", f"secret,id=s,data={MARKER}"]),
        (["-object", '{"qom-type":"secret","id":"s","data":"geheim"}'],
         ["-object", f'{{"qom-type": "secret", "id": "s", "data": "{MARKER}"}}']),
        (["-spice", "port=1,password=geheim"],
         ["-spice", f"port=1,password={MARKER}"]),
        (["-iscsi", "user=u,password=ge,,heim"],
         ["-iscsi", f"user=u,password={MARKER}"]),
        (["-drive", "file=http://u:geheim@h/x,if=virtio"],
         ["-drive", f"file=http://u:{MARKER}@h/x,if=virtio"]),
        (["-drive", "file=rbd:pool/img:id=a:key=geheim:x=y"],
         ["-drive", f"file=rbd:pool/img:id=a:key={MARKER}:x=y"]),
        (["iscsi://u%geheim@h/t"], [f"iscsi://u%{MARKER}@h/t"]),
    ],
    ids=str,
)  # fmt: skip
def test_secrets_are_not_recorded(argv: list[str], expected: list[str]) -> None:
    recorded = record([QEMU, *argv])
    assert recorded.argv == (QEMU, *expected)
    assert len(recorded.notes) == 1
    assert "geheim" not in "".join((*recorded.argv, *recorded.notes))


@pytest.mark.parametrize(
    "argv",
    [
        ["-object", "secret,id=s,file=/run/key"],
        ["-vnc", ":1,password=on"],
        ["-append", "password=x"],
        ["-object", "tls-creds-x509,id=t,dir=/d,passwordid=s"],
        ["-name", "data=1", "disk.img"],
    ],
    ids=str,
)
def test_what_is_no_secret_is_recorded(argv: list[str]) -> None:
    assert record([QEMU, *argv]).argv == (QEMU, *argv)
    assert not record([QEMU, *argv]).notes


def test_read_gives_the_command_line_of_a_process() -> None:
    argv = command_line.read(os.getpid())
    assert argv[0]
    assert command_line.working_directory(os.getpid()) == os.getcwd()  # noqa: PTH109
    with pytest.raises(errors.IoError):
        command_line.read(2**22 + 1)


def test_the_document_has_the_table() -> None:
    assert command_line.table() in DOCUMENT.read_text()


def test_every_option_has_its_handler() -> None:
    for option in OPTIONS.values():
        if option.handler:
            assert hasattr(command_line._Planner, f"_do_{option.handler}")


# ------------------------------------------------------------- option strings


@pytest.mark.parametrize(
    "text",
    ["", "a", "a,b", "a=b,c=d,,e,f", "server,nowait", "a=b=c", ',,x', "a=,b",
     '{"a": {"b": [1, {"c": null}]}, "d": true}'],
)  # fmt: skip
def test_unchanged_option_strings_are_the_same(text: str) -> None:
    assert str(OptionString.parse(text, implied="i")) == text


def test_option_string_values() -> None:
    options = OptionString.parse("tcp,a=1,,2,server,nowait,x.y=z", implied="kind")
    assert dict(options.pairs()) == {
        "kind": "tcp",
        "a": "1,2",
        "server": "on",
        "wait": "off",
        "x.y": "z",
    }
    assert str(options.with_("a", "3,4")) == "tcp,a=3,,4,server,nowait,x.y=z"
    assert str(options.without("x")) == "tcp,a=1,,2,server,nowait"


@pytest.mark.parametrize("text", ["{", "{]", '{"a.b": 1}', "{" + '"a":[' * 40000])
def test_bad_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        OptionString.parse(text)
