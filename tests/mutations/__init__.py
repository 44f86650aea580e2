"""Guards that are taken out, one at a time: a test must fail without each. The coordinator's are in simulation/."""

from tests.mutations.adapters import ADAPTERS
from tests.mutations.in_place import IN_PLACE
from tests.mutations.journal import JOURNAL
from tests.mutations.prompts import PROMPTS
from tests.mutations.relays import RELAYS
from tests.mutations.together import TOGETHER

GUARDS = (*ADAPTERS, *IN_PLACE, *JOURNAL, *PROMPTS, *RELAYS, *TOGETHER)
