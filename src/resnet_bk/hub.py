"""One file of a repository on the Hugging Face Hub."""

import logging
from pathlib import Path

from resnet_bk.errors import UserError


class HubError(UserError):
    """The Hub does not have a file, or cannot be asked; the message says which."""


def cached_file(repository: str, name: str) -> Path | None:
    """The copy that an earlier call brought, if one did."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def hub_file(repository: str, name: str) -> Path:
    """File ``name`` of a repository: the copy that an earlier call brought, else a new one.

    Raises:
        HubError: there is none, or the network is not there. Other than the library itself, this does not try again for
        half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if (cached := cached_file(repository, name)) is not None:
        return cached
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry
    try:
        get_hf_file_metadata(hf_hub_url(repository, name))  # one try: a download would retry
        return Path(hf_hub_download(repository, name))
    except HfHubHTTPError:
        raise HubError(f"the Hub has no {name} of {repository} (or it is private); mend the name") from None
    except Exception as error:  # of the network, and of the HTTP library in use
        reason = " ".join(str(error).split())
        raise HubError(
            f"there is no {name} of {repository} here and the Hub cannot be reached ({reason}); check the network"
        ) from None
