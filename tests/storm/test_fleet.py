"""A fleet that ends leaves nothing behind, whatever its servers do."""

import asyncio
from dataclasses import replace

from tests.storm import fleet as fleet_module
from tests.storm.fleet import TABLE, Fleet


class DeafFleet(Fleet):
    """Its servers do not hear that the run is over, and are killed; one takes longer to die than the other."""

    ended: tuple[int, ...] = ()

    async def live_learner(self) -> int:
        return 0

    async def keep_server(self, number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1 * number)
            self.ended += (number,)


async def test_servers_that_do_not_hear_of_the_end_are_each_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_module, "FAREWELL_S", 0.05)
    fleet = DeafFleet(tmp_path, (), servers=3, stack=replace(TABLE, make_model=lambda directory: None))
    async with asyncio.timeout(10):
        await fleet.run()
    assert fleet.ended == (0, 1, 2)
