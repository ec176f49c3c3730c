"""Terminates TLS in front of a plain server, as stunnel does; ``tests.servers.tls_front`` runs it.

Arguments: its port, the server's port, the file with its certificate, and the file with the authority of
clients' certificates if it asks for them.
"""

import asyncio
import ssl
import sys
from contextlib import suppress

BROKEN = (OSError, asyncio.IncompleteReadError)


async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(*BROKEN):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    with suppress(*BROKEN):
        target.close()


async def main(port: int, server_port: int, certificate: str, authority: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    if authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind = await asyncio.open_connection("127.0.0.1", server_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, behind[1]), pump(behind[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=context)
    asyncio.get_running_loop().set_exception_handler(
        lambda *_: None
    )  # a refusal is the client's to tell
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    port, server_port, certificate, *authority = sys.argv[1:]
    asyncio.run(main(int(port), int(server_port), certificate, authority[0] if authority else None))
