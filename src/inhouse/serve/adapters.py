"""Loading and unloading LoRA adapters over HTTP, with the routes and fields that vLLM's clients know.

Paths are inside one folder that the administrator names; without it clients load nothing.
"""

import asyncio
from pathlib import Path

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from inhouse.core.errors import NotFoundError, UnsupportedError
from inhouse.serve.pool import Pool
from inhouse.serve.shapes import Adapter, errors


class LoadAdapter(BaseModel):
    """The body of `/v1/load_lora_adapter`."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(min_length=1, max_length=200, description="the name by which requests ask for it")
    lora_path: str = Field(min_length=1, max_length=1000, description="inside the folder of adapters")
    base_model_name: str | None = Field(None, description="the model it changes; may be left out if there is one")


class UnloadAdapter(BaseModel):
    """The body of `/v1/unload_lora_adapter`."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(min_length=1, max_length=200)


def routes(pool: Pool, folder: str) -> APIRouter:
    """The two routes; `folder`: where clients may load adapters from, "" for nowhere."""
    router = APIRouter()

    @router.post("/v1/load_lora_adapter", tags=["models"], response_model=Adapter,
                 responses=errors(400, 401, 404, 409, 429, 503))  # fmt: skip
    async def load_lora_adapter(body: LoadAdapter) -> Adapter:
        """Loads an adapter; requests that name it as their model get it, others run on meanwhile."""
        path = _inside(folder, body.lora_path)
        info = await asyncio.to_thread(pool.load_adapter, body.lora_name, path, body.base_model_name)
        return Adapter(id=info.name, rank=info.rank, bytes=info.nbytes, loaded=True)

    @router.post("/v1/unload_lora_adapter", tags=["models"], response_model=Adapter, responses=errors(400, 401, 404))
    async def unload_lora_adapter(body: UnloadAdapter) -> Adapter:
        """Forgets an adapter; answers that run with it end as they began."""
        info = await asyncio.to_thread(pool.unload_adapter, body.lora_name)
        return Adapter(id=info.name, rank=info.rank, bytes=info.nbytes, loaded=False)

    return router


def _inside(folder: str, name: str) -> Path:
    """The path inside the folder; raises UnsupportedError where there is none, NotFoundError for what leads out."""
    if not folder:
        raise UnsupportedError(
            "this server lets no client load adapters",
            remedy="Start it with --adapter-folder FOLDER, or load adapters at start with --adapters",
            param="lora_path",
        )
    root = Path(folder).resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError):
        path = root.parent
    if path == root or not path.is_relative_to(root):
        raise NotFoundError(f"no adapter {name!r} in the folder of adapters", param="lora_path")
    return path
