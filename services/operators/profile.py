"""The operator's profile file: which federation, where its services are, and who the operator is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import field_validator

from services.common.config import Address, ServiceConfig, load_config
from services.common.enrolment import Enrolment
from services.common.identity import check_name
from shelora.errors import InvalidConfiguration, SheLoraError

PROFILE_VARIABLE: Final = "SHELORA_PROFILE"
"""Environment variable that names the profile file."""

DEFAULT_PROFILE: Final = Path("operator.yaml")
"""The profile file when neither an option nor the environment names one."""


class OperatorProfile(ServiceConfig):
    """The whole file; without `keymanager` its address is taken from the enrolment file."""

    federation: str
    aggregator: Address
    keymanager: Address | None = None
    identity_dir: Path
    enrolment_file: Path | None = None
    """Needed until the operator holds a certificate."""

    @field_validator("federation")
    @classmethod
    def _check_federation(cls, name: str) -> str:
        try:
            return check_name(name, "federation")
        except SheLoraError as error:
            raise ValueError(str(error)) from error

    def keymanager_address(self) -> str:
        """Address of the key manager's port for agents and operators.

        Raises:
            InvalidConfiguration: neither the profile nor the enrolment file names it.
        """
        if self.keymanager is not None:
            return self.keymanager
        if self.enrolment_file is None or not self.enrolment_file.exists():
            raise InvalidConfiguration(
                "profile: expected the field keymanager or a readable enrolment_file, got neither",
                hint="add keymanager: HOST:PORT of the key manager to the profile",
            )
        return Enrolment.load(self.enrolment_file).keymanager


def load_profile(path: Path) -> OperatorProfile:
    """Read a profile.

    Raises:
        InvalidConfiguration: missing, unreadable, or with wrong fields.
    """
    if not path.exists():
        raise InvalidConfiguration(
            f"profile: expected a file, got {path}, which does not exist",
            hint=f"name one with --profile FILE or the environment variable {PROFILE_VARIABLE}",
        )
    return load_config(OperatorProfile, path, service="operator")
