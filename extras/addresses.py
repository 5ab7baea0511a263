"""Pictures and films from `http(s)://` and `data:` addresses."""

import tempfile
import time
import urllib.request
from typing import BinaryIO

import httpx2

TIMEOUT = 20.0  # seconds without a byte
DEADLINE = 600.0  # seconds in all
MAX_BYTES = 2**30
IN_MEMORY = 2**26  # what is larger lies in a temporary file


def fetch(address: str, timeout: float = TIMEOUT, deadline: float = DEADLINE, max_bytes: int = MAX_BYTES) -> BinaryIO:
    """The content of an address as an open file that can be read and seeked. Redirections are followed.

    Raises ValueError for an address that makes no sense, an answer other than 200 and more than max_bytes; OSError
    (TimeoutError) when the server cannot be reached or is silent for timeout seconds or not done after deadline.
    """
    file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  the caller has it from here on
    name = f"{address:.80}"
    if address.startswith("data:"):
        try:
            with urllib.request.urlopen(address) as content:  # knows base64 and percent signs
                file.write(content.read())
        except ValueError as error:
            raise ValueError(f"cannot read the address {name}: {error}") from error
    else:
        end = time.monotonic() + deadline
        too_much = ValueError(f"{name} holds more than {max_bytes / 1e6:,.0f} MB; download it and give the file")
        try:
            with httpx2.stream("GET", address, timeout=timeout, follow_redirects=True) as answer:
                if answer.status_code != 200:
                    raise ValueError(f"{name} was answered with {answer.status_code} {answer.reason_phrase}")
                if int(answer.headers.get("content-length", 0)) > max_bytes:
                    raise too_much
                for part in answer.iter_bytes():
                    file.write(part)
                    if file.tell() > max_bytes:  # a server need not say its length, nor keep to it
                        raise too_much
                    if time.monotonic() > end:
                        raise TimeoutError(f"{name} was not there after {deadline:.0f} seconds")
        except httpx2.TimeoutException as error:
            raise TimeoutError(f"{name} sent nothing for {timeout:g} seconds") from error
        except httpx2.InvalidURL as error:
            raise ValueError(f"{name} is no address: {error}") from error
        except httpx2.HTTPError as error:
            raise OSError(f"cannot fetch {name}: {error}") from error
    file.seek(0)
    return file
