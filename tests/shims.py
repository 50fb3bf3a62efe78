"""Stand-ins for the programs that `ray up` reaches other machines with, and for what it finds there.

`install` makes a folder of them for the user's machine and one for the machines of the cloud. Whatever host they are
told, they stay on this machine: each host is a home folder of its own, below `homes`. What is started there runs for
real, Ray included, but for `ray stop` (which would stop every Ray of the machine), for installing packages, and for
ports that others may have. Each writes a line into a log: who was called, where, with what.

    python tests/shims.py SETTINGS PROGRAM ARGUMENTS...
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

USERS = "ssh", "rsync", "aws"
CLOUD = "ssh", "rsync", "sudo", "apt-get", "python3"
MACHINE = "SHIM_MACHINE"
"""Marks, in their environment, the processes of a machine of the cloud, by its home folder."""


def install(folder: Path, settings: dict[str, Any]) -> Path:
    """Make both folders; the settings' file. `settings`: homes, environment, ports (what Ray's own are replaced by)."""
    file = folder / "settings.json"
    file.write_text(json.dumps(settings | {"log": str(folder / "log.jsonl"), "programs": str(folder / "cloud")}))
    for name, programs in (("user", USERS), ("cloud", CLOUD)):
        for program in programs:
            script(folder / name / program, f"{sys.executable} {Path(__file__).resolve()} {file} {program}")
    return file


def script(path: Path, command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)


def home(settings: dict[str, Any], host: str) -> Path:
    """The home folder of a machine, as Ubuntu makes it."""
    folder = Path(settings["homes"], host)
    if not folder.exists():
        folder.mkdir(parents=True)
        for name in (".bashrc", ".profile"):
            (folder / name).write_text("# as on Ubuntu\n")
        with (folder / ".profile").open("a") as profile:
            profile.write(f"PATH={settings['programs']}:$PATH\n")
    return folder


def machine(settings: dict[str, Any], host: str) -> dict[str, str]:
    """The environment of what is started there: none of this machine's but what `settings` names."""
    folder = str(home(settings, host))
    # The user reaches the head, and the head the workers. Their keys tell AWS who asks, as roles would.
    role = "worker" if MACHINE in os.environ else "head"
    own = {"HOME": folder, "USER": "ubuntu", "LANG": "C.UTF-8", MACHINE: folder, "AWS_ACCESS_KEY_ID": role}
    own["RAY_TMPDIR"] = str(Path(settings["homes"]).parent / host)
    return {"PATH": f"{settings['programs']}:/usr/bin:/bin", **settings["environment"], **own}


def ssh(settings: dict[str, Any], arguments: list[str]) -> int:
    """ssh [-tt] [-L LOCAL:localhost:REMOTE]... [-i KEY] [-o OPTION]... USER@HOST COMMAND..."""
    tunnels, words = [], list(arguments)
    while words[0].startswith("-"):
        option = words.pop(0)
        if option in ("-L", "-i", "-o"):
            value = words.pop(0)
            if option == "-L":
                tunnels.append(value.split(":localhost:"))
            if option == "-i" and not Path(value).expanduser().is_file():  # ssh knows ~ itself
                sys.exit(f"ssh: no key {value}")
    host = words.pop(0).partition("@")[2]
    for local, remote in tunnels:
        threading.Thread(target=tunnel, args=(int(local), settings["ports"][remote]), daemon=True).start()
    environment = machine(settings, host)
    # The words are joined and read by the other side's shell, as ssh does it.
    command = ["bash", "-c", " ".join(words)]
    return subprocess.run(command, env=environment, cwd=environment["HOME"], stdin=subprocess.DEVNULL).returncode


def tunnel(local: int, remote: int) -> None:
    def carry(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    server = socket.create_server(("127.0.0.1", local))
    while True:
        client, _ = server.accept()
        beyond = socket.create_connection(("127.0.0.1", remote))
        for ends in ((client, beyond), (beyond, client)):
            threading.Thread(target=carry, args=ends, daemon=True).start()


def rsync(settings: dict[str, Any], arguments: list[str]) -> int:
    """rsync --rsh SSH -avz [--exclude PATTERN]... SOURCE USER@HOST:TARGET"""
    excluded = [arguments[at + 1] for at, word in enumerate(arguments) if word == "--exclude"]
    source, (host, _, target) = arguments[-2], arguments[-1].partition("@")[2].partition(":")
    target = target.replace("~", str(home(settings, host)), 1)
    if not source.endswith("/"):
        shutil.copy2(source, target)
        return 0

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if any(fnmatch(name, pattern.removeprefix("**/")) for pattern in excluded)]

    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True, symlinks=True)
    return 0


def sudo(settings: dict[str, Any], arguments: list[str]) -> int:
    return 0


def python3(settings: dict[str, Any], arguments: list[str]) -> int:
    """python3 -m venv FOLDER"""
    if arguments[:2] != ["-m", "venv"]:
        sys.exit(f"python3: not known here: {arguments}")
    for program in ("pip", "ray"):
        file = Path(arguments[2], "bin", program)
        script(file, f"{sys.executable} {Path(__file__).resolve()} {sys.argv[1]} {program}")
    script(Path(arguments[2], "bin/python"), sys.executable)
    return 0


def pip(settings: dict[str, Any], arguments: list[str]) -> int:
    """pip install -q -c FILE -e FOLDER: takes note of the folder, for Python to find what is in it."""
    if not Path(arguments[arguments.index("-c") + 1]).is_file():
        sys.exit("pip: no file of constraints")
    Path(os.environ["HOME"], "installed").write_text(arguments[arguments.index("-e") + 1])
    return 0


def ray(settings: dict[str, Any], arguments: list[str]) -> int:
    if arguments == ["stop"]:
        stop(Path(os.environ[MACHINE]))
        return 0
    ports = settings["ports"]
    if arguments[0] == "start":
        head = "--head" in arguments
        arguments = [
            {"--port=6379": f"--port={ports['6379']}"}.get(word, word).replace(":6379", f":{ports['6379']}")
            for word in arguments
        ]
        arguments += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        # Else it is the head's; two nodes in one folder take each other's unpacked code away.
        arguments += [f"--temp-dir={os.environ['RAY_TMPDIR']}/ray"]
        arguments += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        if head:
            arguments += [f"--dashboard-port={ports['8265']}", f"--ray-client-server-port={free_port()}"]
    os.environ["PYTHONPATH"] = Path(os.environ["HOME"], "installed").read_text()
    program = str(Path(sys.executable).with_name("ray"))
    os.execv(program, [program, *arguments])
    raise AssertionError("unreachable")


_GIVEN: set[int] = set()
"""Ports that are to be listened on, if not yet."""


def free_port() -> int:
    """Not one of those that the system deals out: it would give it to another process before ours takes it."""
    for port in set(random.sample(range(20000, 32000), 1000)) - _GIVEN:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _GIVEN.add(port)
            return port
    raise OSError("no port is free")


def stop(folder: Path) -> None:
    """Kill what runs on the machines whose home folder it is or lies below, but for the processes that ask for it."""
    asking, pid = {os.getpid()}, os.getpid()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        asking.add(pid)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) not in asking:
            try:
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                machines = [Path(word.partition("=")[2]) for word in words if word.startswith(f"{MACHINE}=")]
                if any(folder in (machine, *machine.parents) for machine in machines):
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:  # gone meanwhile, or somebody else's
                continue


def aws(settings: dict[str, Any], arguments: list[str]) -> int:
    """The part of the AWS CLI that docs/cluster.md needs: any operation, short forms for buckets and groups' rules."""
    import boto3
    import jmespath

    service, operation, *rest = arguments
    if (service, operation) == ("s3", "mb"):
        client = boto3.session.Session().client("s3")
        place = {"LocationConstraint": client.meta.region_name}
        client.create_bucket(Bucket=rest[0].removeprefix("s3://"), CreateBucketConfiguration=place)
        return 0
    options: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            options[word] = []
        else:
            options[list(options)[-1]].append(word)
    query, _ = options.pop("--query", ["@"]), options.pop("--output", [])
    if operation == "authorize-security-group-ingress":
        (protocol,) = options.pop("--protocol")
        rule: dict[str, Any] = {"IpProtocol": "-1" if protocol == "all" else protocol}
        if port := options.pop("--port", None):
            rule |= {"FromPort": int(port[0]), "ToPort": int(port[0])}
        if cidr := options.pop("--cidr", None):
            rule["IpRanges"] = [{"CidrIp": cidr[0]}]
        if group := options.pop("--source-group", None):
            rule["UserIdGroupPairs"] = [{"GroupId": group[0]}]
        parameters: dict[str, Any] = {"IpPermissions": [rule]}
    else:
        parameters = {}
    client = boto3.session.Session().client("s3" if service == "s3api" else service)
    for option, values in options.items():
        name = "".join(part.capitalize() for part in option.removeprefix("--").split("-"))
        shape = client.meta.service_model.operation_model(
            client.meta.method_to_api_mapping[operation.replace("-", "_")]
        ).input_shape.members
        name = next(member for member in shape if member.lower() == name.lower())
        if values[0].startswith("file://"):
            values = [Path(values[0].removeprefix("file://")).read_text()]
        if name == "Filters":
            pairs = [value.removeprefix("Name=").split(",Values=") for value in values]
            parameters[name] = [{"Name": key, "Values": wanted.split(",")} for key, wanted in pairs]
        elif shape[name].type_name == "structure":
            parameters[name] = json.loads(values[0])
        else:
            parameters[name] = values if shape[name].type_name == "list" else values[0]
    answer = getattr(client, operation.replace("-", "_"))(**parameters)
    answer.pop("ResponseMetadata", None)
    found = jmespath.search(query[0], answer)
    if found not in (None, {}):
        print(found if isinstance(found, str) else json.dumps(found, default=str))
    return 0


def main() -> int:
    settings = json.loads(Path(sys.argv[1]).read_text())
    program, arguments = sys.argv[2], sys.argv[3:]
    with Path(settings["log"]).open("a") as log:
        log.write(json.dumps([program, Path(os.environ.get(MACHINE, "user")).name, arguments]) + "\n")
    if program == "apt-get":
        return 0
    return int(globals()[program](settings, arguments))


if __name__ == "__main__":
    sys.exit(main())
