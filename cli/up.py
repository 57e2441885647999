"""`tunesmith up`: everything on one machine."""

import sys

from cli.failure import Failed
from cli.options import DATA_DIR, HOST, PORT, Host, Port, StackDir


def up(data_dir: StackDir = DATA_DIR, port: Port = PORT, host: Host = HOST) -> None:
    """Run the whole service on this machine.

    Postgres, Valkey, S3, the API, the workers and an engine, supervised, in the
    foreground. An engine is started for each of TUNESMITH_TRAINING__QUANTIZATIONS
    ('["nf4", "int8"]'; by default nf4 alone), and jobs may have their base held in
    those ways.

    When all is ready DIR/credentials.json holds {"base_url": ..., "api_key": ...},
    both for the OpenAI client. Ctrl-C stops everything in order, a second Ctrl-C at
    once. What was made stays in DIR for the next start.
    """
    from cli.doctor import configuration

    try:
        from worker.embedded import StackError, stack
    except ImportError as error:
        raise Failed(f"{error}; `tunesmith up` needs: pip install 'tunesmith[embedded]'") from error
    settings = configuration.require()
    for finding in (configuration.catalog(settings), configuration.prices(settings)):
        configuration.require_fit(finding)
    try:
        stack.up(data_dir, settings, host=host, port=port, console=sys.stdout)
    except (StackError, OSError) as error:
        raise Failed(error) from error
