"""Every setting of a server, checked once, before anything starts."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator


class Limits(BaseModel):
    """What a single request may ask for, and how long its client may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int = Field(10, ge=1, le=64)  # `n`
    steps: int = Field(250, ge=1)
    prompt_chars: int = Field(4000, ge=1)
    pixels_px: int = Field(2048 * 2048, ge=1)
    body_bytes: int = Field(64 * 1024, ge=1024)
    header_timeout_s: float = Field(10.0, gt=0)  # from the first byte of a request, or the connection, to the end of its headers
    body_timeout_s: float = Field(10.0, gt=0)
    send_timeout_s: float = Field(30.0, gt=0)  # a client that doesn't read its answer
    connections: int = Field(1024, ge=1)
    request_timeout_s: float = Field(600.0, gt=0)  # from arrival to the last byte computed; a request may ask for less


class ServerSettings(BaseModel):
    """One server: a model, its ranks, its queue. `Raises` pydantic's ValidationError for contradictions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str  # as `dite generate` takes it
    name: str = ""  # what clients call it
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    api_key: SecretStr | None = None
    hosts: tuple[str, ...] = ()  # names that a server without a key answers to, besides this machine's own (dite.server.edge says why)

    device: str = "cpu"
    dtype: str | None = None
    nproc: int = Field(1, ge=1)
    mode: str = "kv_gather"
    codec: str = "int4"
    order: int = Field(2, ge=0, le=2)

    steps: int = Field(50, ge=1)  # where a request doesn't say
    guidance: float = Field(4.0, ge=0.0)
    batching: Literal["continuous", "dynamic", "none"] = "continuous"
    max_batch: int = Field(8, ge=1)  # pictures drawn at once
    micro_batch: int | None = Field(None, ge=1)  # every forward has exactly so many rows: pictures don't depend on their neighbours, to the last bit
    max_queue: int = Field(64, ge=0)  # pictures (of the default size and steps) that may wait

    limits: Limits = Limits()
    startup_timeout_s: float = Field(900.0, gt=0)
    heartbeat_timeout_s: float = Field(10.0, gt=0)  # a rank that says nothing for so long is taken for dead
    step_timeout_s: float = Field(120.0, gt=0)  # and so is one that computes a step for so long
    drain_timeout_s: float = Field(120.0, gt=0)
    max_restarts: int = Field(3, ge=0)  # within restart_window_s; one more, and the server exits
    restart_window_s: float = Field(600.0, gt=0)

    @model_validator(mode="after")
    def _guarded(self) -> ServerSettings:
        if not is_loopback(self.host) and self.api_key is None:
            raise ValueError(f"--host {self.host} can be reached from other machines, and no --api-key-file is set; give one, or listen on 127.0.0.1")
        return self

    @property
    def served_name(self) -> str:
        """The model's id in `/v1/models`. A folder's own name, never its path."""
        return self.name or (self.model if self.model.startswith("builtin:") or not Path(self.model).exists() else Path(self.model).resolve().name)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
