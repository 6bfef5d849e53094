"""Certificates of authorities made up for tests, as PEM files; and TLS sockets by hand."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import trustme

import raw
from symbiosis import Tls
from symbiosis.transport.tls import ServerTls


class Files(NamedTuple):
    """One authority, and what it has signed."""

    ca: Path
    server: Path
    ann: Path
    """A client's certificate, common name and email ``ann``."""
    stranger: Path
    """A client's certificate for a name that nobody knows."""

    def serving(self, *, mutual: bool = False) -> ServerTls:
        return ServerTls(self.server, client_ca=self.ca if mutual else None)

    def trusting(self, cert: Path | None = None) -> Tls:
        return Tls(ca=self.ca, cert=cert)


def make(folder: Path, host: str = "127.0.0.1") -> Files:
    """``folder`` receives one file for each; certificate and private key are in the same."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    files = Files(*(folder / f"{name}.pem" for name in Files._fields))
    authority.cert_pem.write_to_path(files.ca)
    for path, leaf in (
        (files.server, authority.issue_cert(host)),
        (files.ann, authority.issue_cert("ann@tenants.test", common_name="ann")),
        (files.stranger, authority.issue_cert("eve@tenants.test", common_name="eve")),
    ):
        leaf.private_key_and_cert_chain_pem.write_to_path(path)
    return files


def connect_tcp(url: str) -> socket.socket:
    """A bare connection to the port of any URL."""
    parts = urlsplit(url)
    return socket.create_connection((str(parts.hostname), parts.port), 30)


class TlsRawClient(raw.RawClient):
    """`raw.RawClient` over TLS."""

    def __init__(self, url: str, files: Files, *, greet: bool = True) -> None:
        context = ssl.create_default_context(cafile=files.ca)
        self.socket = context.wrap_socket(connect_tcp(url), server_hostname=urlsplit(url).hostname)
        self.session = 0
        if greet:
            self.send(raw.hello())
            assert self.receive().kind == raw.WELCOME
