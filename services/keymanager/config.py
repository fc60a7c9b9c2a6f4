"""keymanager.yaml."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, SecretStr

from services.common.addresses import split_address, unix_path
from services.common.config import Address, ServiceConfig
from services.common.identity import Role, check_name
from services.keymanager.ca import check_server_names
from services.keymanager.seal import Vault, parse_keys, read_key_file
from shelora.errors import InvalidConfiguration, SheLoraError

KEK_VARIABLE: Final = "SHELORA_KEYMANAGER__KEK"


def _check_federation(name: str) -> str:
    try:
        return check_name(name, "federation")
    except SheLoraError as error:
        raise ValueError(error.message) from error


def _check_server_names(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return check_server_names(names, Role.KEYMANAGER)
    except SheLoraError as error:
        raise ValueError(error.message) from error


class KeyManagerConfig(ServiceConfig):
    """Configuration of the key manager.

    Attributes:
        federation: name of the one federation it serves.
        listen: port for agents and operators, mutual TLS; the only one that hands out (sealed) secrets.
        enrolment_listen: port for enrolment, server-side TLS.
        membership_listen: port for renewals and revocations only, mutual TLS; all that an aggregator needs.
        ops_listen: HTTP for health and metrics.
        health_listen: gRPC without TLS that serves the standard health service and nothing else; off unless set.
        state_dir: database.
        kek_file: key-encryption keys, one base64 line each; the first encrypts, all decrypt.
        kek: the same as a text; for the environment variable SHELORA_KEYMANAGER__KEK. Wins over kek_file.
        certificate_lifetime_s: validity of members' certificates.
        server_names: DNS names and IP addresses in the key manager's own certificate.
        advertise_keymanager: address that enrolment files name; the default is `listen`.
        advertise_enrolment: address that enrolment files name; the default is `enrolment_listen`.
        advertise_membership: address that an aggregator's enrolment file names as its key manager; the default is
            `membership_listen`.
        log_level: lowest level that is logged.
    """

    federation: Annotated[str, AfterValidator(_check_federation)]
    listen: Address = "127.0.0.1:7441"
    enrolment_listen: Address = "127.0.0.1:7442"
    membership_listen: Address = "127.0.0.1:7444"
    ops_listen: Address = "127.0.0.1:7481"
    health_listen: Address | None = None
    state_dir: Path = Path("keymanager-state")
    kek_file: Path = Path("keymanager.kek")
    kek: SecretStr | None = None
    certificate_lifetime_s: int = Field(default=86_400, ge=60, le=31_536_000)
    server_names: Annotated[tuple[str, ...], AfterValidator(_check_server_names)] = ("localhost", "127.0.0.1", "::1")
    advertise_keymanager: Address | None = None
    advertise_enrolment: Address | None = None
    advertise_membership: Address | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def database_path(self) -> Path:
        return self.state_dir / "keymanager.db"

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.database_path}"

    def vault(self) -> Vault:
        """The key-encryption keys, from the environment or from the file."""
        if self.kek is not None:
            return Vault(parse_keys(self.kek.get_secret_value(), KEK_VARIABLE))
        return Vault(read_key_file(self.kek_file))

    def advertised(self, role: Role) -> tuple[str, str]:
        """Where a member of that role reaches the key manager, and where it enrols.

        Raises: InvalidConfiguration when the configuration names no address that others could reach.
        """
        if role is Role.AGGREGATOR:
            keymanager = _reachable(self.advertise_membership or self.membership_listen, "advertise_membership")
        else:
            keymanager = _reachable(self.advertise_keymanager or self.listen, "advertise_keymanager")
        return keymanager, _reachable(self.advertise_enrolment or self.enrolment_listen, "advertise_enrolment")


def _reachable(address: str, field: str) -> str:
    if unix_path(address) is None:
        host, port = split_address(address)
        try:
            wildcard = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            wildcard = False
        if wildcard or port == 0:
            raise InvalidConfiguration(
                f"{field}: expected an address that members can reach, got {address}",
                hint=f"set {field} in keymanager.yaml, for example keymanager.example.org:{port or 7441}",
            )
    return address
