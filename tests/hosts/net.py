"""Hosts as network namespaces of this machine, each with one link to a switch. Gone with the object, however it ends."""

import os
import subprocess


def _ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True)


class Net:
    def __init__(self, count):
        self.hosts = [f"reshard-{os.getpid()}-{i}" for i in range(count)]
        self._switch = f"reshard-{os.getpid()}-switch"
        self._made = []

    def __enter__(self):
        try:
            for name in [self._switch, *self.hosts]:
                _ip("netns", "add", name)
                self._made.append(name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for i, host in enumerate(self.hosts):
                _ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", f"port{i}", "netns", self._switch)
                _ip("-n", self._switch, "link", "set", f"port{i}", "master", "bridge", "up")
                _ip("-n", host, "address", "add", f"{self.address(i)}/24", "dev", "eth0")
                _ip("-n", host, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self._made:
            for process in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                subprocess.run(["kill", "-9", process])
            subprocess.run(["ip", "netns", "delete", name])

    @staticmethod
    def address(host):
        return f"10.77.0.{host + 1}"

    def on(self, host):
        """What comes before a command that is to run on a host."""
        return ["ip", "netns", "exec", self.hosts[host]]

    def bytes(self):
        """For each host what has come and gone over its link so far."""
        out = []
        for host in range(len(self.hosts)):
            lines = subprocess.run([*self.on(host), "cat", "/proc/net/dev"], check=True, capture_output=True, text=True).stdout
            fields = next(line for line in lines.splitlines() if "eth0:" in line).split(":")[1].split()
            out.append((int(fields[0]), int(fields[8])))
        return out

    def limit(self, host, mbit):
        """A host sends no faster than that."""
        words = ["qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "200ms"]
        subprocess.run([*self.on(host), "tc", *words], check=True)

    def link(self, host, state):
        """Plugs a host's cable in, or out: "up" or "down"."""
        _ip("-n", self._switch, "link", "set", f"port{host}", state)
