"""`tunesmith up` with its servers behind proxies: `python -m bench.chaos.up DATA_DIR PORT PORTS_OF_PROXIES` (JSON, by server).

The processes are those of `tunesmith up`, with a second train worker and the toy trainer; one that dies often is started again
as soon as one that dies for the first time, since it is us who kill it. Where the servers really listen is
written to DATA_DIR/servers.json: the proxies are whoever's started this.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from app.core.settings import PREFIX, Settings
from worker.embedded import processes, stack
from worker.embedded.programs import Process, service

SERVERS_FILE = "servers.json"


def behind_proxies(data_dir: Path, proxies: Mapping[str, int], settings: Settings, host: str, port: int) -> tuple[Process, ...]:
    urls = {
        "DATABASE__API_URL": ("postgres", settings.database.api_url.get_secret_value()),
        "DATABASE__SYSTEM_URL": ("postgres", settings.database.system_url.get_secret_value()),
        "BROKER_URL": ("valkey", settings.broker_url),
        "STORAGE__ENDPOINT_URL": ("s3", str(settings.storage.endpoint_url)),
    }
    listening = {server: urlsplit(url).port for server, url in urls.values()}
    (data_dir / SERVERS_FILE).write_text(json.dumps(listening))
    proxied = {name: re.sub(r":\d+(?=/|$)", f":{proxies[server]}", url) for name, (server, url) in urls.items()}

    def led_there(process: Process) -> Process:
        granted = tuple(process.secrets)
        theirs = {PREFIX + name: url for name, url in proxied.items() if name.startswith(granted)}
        return replace(process, variables=process.variables | theirs)

    led = [led_there(process) for process in service(settings, host, port)]
    train = next(process for process in led if process.name == "train")
    toy = replace(train, arguments=("-m", "bench.chaos.train"))
    return (*(process for process in led if process is not train), toy, replace(toy, name="train2"))


if __name__ == "__main__":
    processes.LONGEST_PAUSE_SECONDS = processes.FIRST_PAUSE_SECONDS
    data_dir, port, proxies = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    chosen = partial(behind_proxies, data_dir, proxies)
    stack.up(data_dir, Settings(), host="127.0.0.1", port=port, console=sys.stdout, processes=chosen)
