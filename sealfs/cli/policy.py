"""`policy`: states of hosts that the owner of an offline key approves.

`policy sign` needs neither a TPM nor a state directory when it is given the PCR values: it runs
where the private key is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from sealfs.cli import asked
from sealfs.cli.arguments import PCRS
from sealfs.cli.output import print_json, print_table
from sealfs.cli.protecting import KEY_FILE_SIZE_MAX, read_small
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import AlreadyExists, UsageError
from sealfs.keys import signed
from sealfs.keys.hardening import harden
from sealfs.keys.policy import PCR_COUNT, check_pcrs
from sealfs.keys.signed import Limit

VALUES_SIZE_MAX = 64 * 1024
_VALUE = re.compile(r"\s*(\d{1,2})\s*:?\s+(?:0x)?([0-9a-fA-F]{64})\s*", re.ASCII)
"""A PCR as `tpm2_pcrread sha256` prints it, and `sealfs policy host`."""
_FACT = re.compile(r"(\w+):\s*(\w+)\s*", re.ASCII)


@click.group("policy")
def policy_command() -> None:
    """Signed policies: PCR values that the owner of an offline key approves.

    A key made with --signed-policy PUBLIC.pem opens while the PCRs are as a policy says that this
    key signed. So before an upgrade the values of after it are signed and added, on any number
    of hosts, and no key is sealed anew.
    """


@policy_command.command("sign")
@click.option("--key", "key_file", type=PATH, required=True, metavar="PRIVATE.pem", help="Signs.")
@click.option("--pcrs", type=PCRS, required=True, help="Which PCRs, such as 0,2,7.")
@click.option(
    "--values",
    type=PATH,
    metavar="FILE",
    help="Their values: lines `PCR : SHA-256`. Without, those of this host's TPM.",
)
@click.option(
    "--host",
    type=PATH,
    metavar="FILE",
    help="For one host only, and until its revocation counter passes a value; from `policy host`.",
)
@click.option("--valid-until", type=click.IntRange(0, 2**64 - 1), help="Else the one in --host.")
@click.option("--passphrase-file", metavar="FILE", help="Of the key; without, it is asked for.")
@click.option("-o", "output", type=PATH, required=True, metavar="FILE", help="The policy.")
@common_options
def sign_policy(
    settings: Settings,
    key_file: Path,
    pcrs: tuple[int, ...],
    values: Path | None,
    host: Path | None,
    valid_until: int | None,
    passphrase_file: str | None,
    output: Path,
) -> None:
    """Sign PCR values. With --values it needs no TPM, and belongs where the key is kept."""
    harden()
    pcrs = check_pcrs(pcrs)
    if valid_until is not None and host is None:
        raise UsageError("--valid-until", "is a value of a host's counter; name it by --host")
    limit = None if host is None else _limit_of(host, valid_until)
    if values is None:
        with settings.keys() as keys:
            found = keys.pcr_values(pcrs)
    else:
        found = _values_of(values, pcrs)
    key = _private_key(key_file, passphrase_file)
    _write_new(output, signed.sign(key, pcrs, found, limit).encode())
    if settings.json:
        print_json(
            {"path": str(output), "signer": signed.fingerprint(signed.signer_of(key.public_key()))}
        )


@policy_command.command("add")
@click.argument("policy", type=PATH)
@common_options
def add_policy(settings: Settings, policy: Path) -> None:
    """Take a signed policy to this host, after checking its signature. It is no secret."""
    raw = read_small(policy, signed.SIGNED_SIZE_MAX)
    with settings.keys() as keys:
        name = keys.policies.add(raw, str(policy))
    if settings.json:
        print_json({"id": name})


@policy_command.command("list")
@common_options
def list_policies(settings: Settings) -> None:
    """List the signed policies of this host, and which of them hold now."""
    with settings.keys() as keys:
        found = keys.policies.reports()
    if settings.json:
        print_json([report.to_json() for report in found])
        return
    print_table(
        ("POLICY", "SIGNER", "PCRS", "VALID UNTIL", "NOW"),
        [
            (
                report.id,
                report.signer,
                ",".join(map(str, report.pcrs)),
                "" if report.valid_until is None else str(report.valid_until),
                report.problem or "holds",
            )
            for report in found
        ],
    )


@policy_command.command("revoke")
@common_options
def revoke_policies(settings: Settings) -> None:
    """End the policies that were signed for this host up to now; later ones are not concerned.

    What was signed without --host cannot be ended: give the keys another signer instead.
    """
    with settings.keys() as keys:
        done = keys.policies.revoke()
    if settings.json:
        print_json(done.to_json())
        return
    print(f"the revocation counter is at {done.value}; {len(done.ended)} policies ended by it")
    for name in done.unlimited:
        print(f"{name} was signed without --host and holds on")


@policy_command.command("host")
@click.option("-o", "output", type=PATH, metavar="FILE", help="Else to standard output.")
@common_options
def describe_host(settings: Settings, output: Path | None) -> None:
    """Tell what a signer needs to know: the PCR values, and the revocation counter.

    The counter is made, in the TPM, when this is asked first.
    """
    every = tuple(range(PCR_COUNT))
    with settings.keys() as keys:
        limit = keys.policies.made_counter()
        values = keys.pcr_values(every)
    facts = {
        "counter_index": f"{limit.index:#010x}",
        "counter_label": limit.label.hex(),
        "counter_value": str(limit.value),
    }
    if settings.json:
        print_json({**facts, "pcrs": {str(pcr): values[pcr].hex() for pcr in every}})
        return
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines += ["sha256:", *(f"  {pcr:<2}: 0x{values[pcr].hex()}" for pcr in every)]
    text = "\n".join(lines) + "\n"
    if output is None:
        print(text, end="")
    else:
        _write_new(output, text.encode())


def _lines_of(path: Path) -> list[str]:
    try:
        return read_small(path, VALUES_SIZE_MAX).decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise UsageError(path, "is not text") from None


def _values_of(path: Path, pcrs: tuple[int, ...]) -> tuple[bytes, ...]:
    """Return the values of PCRs from a file.

    Raises:
        UsageError: one is missing, or stands there twice.
    """
    found: dict[int, bytes] = {}
    for match in filter(None, map(_VALUE.fullmatch, _lines_of(path))):
        pcr = int(match[1])
        if pcr in found:
            raise UsageError(path, f"has two SHA-256 values of PCR {pcr}")
        found[pcr] = bytes.fromhex(match[2])
    missing = [str(pcr) for pcr in pcrs if pcr not in found]
    if missing:
        raise UsageError(path, f"has no SHA-256 value of PCR {', '.join(missing)}")
    return tuple(found[pcr] for pcr in pcrs)


def _limit_of(path: Path, valid_until: int | None) -> Limit:
    facts = {match[1]: match[2] for match in filter(None, map(_FACT.fullmatch, _lines_of(path)))}
    try:
        index, value = int(facts["counter_index"], 16), int(facts["counter_value"])
        label = bytes.fromhex(facts["counter_label"])
    except (KeyError, ValueError):
        raise UsageError(path, "is not what `sealfs policy host` writes") from None
    if len(label) != signed.LABEL_SIZE or not 0 <= index < 2**32 or not 0 <= value < 2**64:
        raise UsageError(path, "is not what `sealfs policy host` writes")
    return Limit(index, label, value if valid_until is None else valid_until)


def _private_key(path: Path, passphrase_file: str | None) -> signed.PrivateKey:
    raw = read_small(path, KEY_FILE_SIZE_MAX)
    passphrase = None
    if passphrase_file is not None:
        passphrase = _passphrase(path, passphrase_file)
    key = signed.read_private(raw, passphrase, str(path))
    if key is None:
        key = signed.read_private(raw, _passphrase(path, None), str(path))
    assert key is not None
    return key


def _passphrase(path: Path, file: str | None) -> bytes:
    found = asked.text(f"Passphrase of {path}", file, option="--passphrase-file")
    return found.rstrip("\r\n").encode()


def _write_new(path: Path, content: bytes) -> None:
    """Write a new file whole.

    Raises:
        AlreadyExists: there is one.
    """
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise AlreadyExists(path, "exists") from None
