"""Rounds inside vLLM: which requests share what, who computes it, and who waits for whom.

    arrive ──window──► discovery ──order──► start: plan over the store ──► vLLM's queue
                                              ▲                              │ scheduled
                                              └──── publish: runs, pages ◄───┘

It is the embedded engine's collector over the same store; only pages are vLLM's blocks, and a
request's own pages are known once vLLM has scheduled it. So a request whose segments somebody is
computing starts when they are scheduled, and is planned then.

Nothing here imports vLLM.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokendance.collector.correction import CorrectionPolicy
from tokendance.collector.known import NO_SLOT, KnownKV, look_up, note_reuse, publish
from tokendance.collector.plan import RequestPlan, ReuseRules
from tokendance.collector.planner import Planner, alone
from tokendance.integrations.vllm.arrivals import Arrivals, RoundKey
from tokendance.integrations.vllm.figures import Figures
from tokendance.rounds.discoveries import Discoveries
from tokendance.rounds.discovery import DiscoveryConfig
from tokendance.rounds.segments import (
    EncodedPrompt,
    PrefixHashes,
    Salt,
    SegmentHash,
    TokenIds,
    as_token_ids,
    build_prompt,
    build_prompt_at,
)
from tokendance.store.entries import RoundId, Slots
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds

_NO_PAGES: PageIds = np.empty(0, np.int32)
_NO_ROUND = RoundId(-1)

Positions = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Member:
    """A request of a round.

    Attributes:
        request_id: vLLM's.
        key: of the rounds that it may be in: prompts of different salts never share.
        token_ids: int32, its prompt.
        max_new_tokens: of its answer.
        round_size: requests of its round, if its client has said so.
        blocks: positions (begin, end) of what others read, too, if its client has said so.
        priority: vLLM's: who has a smaller one never waits for it. 0 where vLLM has none.
    """

    request_id: str
    key: RoundKey
    token_ids: TokenIds
    max_new_tokens: int
    round_size: int | None = None
    blocks: tuple[tuple[int, int], ...] | None = None
    priority: int = 0
    round_id: RoundId = _NO_ROUND
    owns_order: bool = False
    prompt: EncodedPrompt | None = None  # once its round is known
    shared: frozenset[SegmentHash] = frozenset()
    in_round: bool = False  # shares something, or goes on with what it has read before
    plan: RequestPlan | None = None  # once it has started
    # int32, of each position of its prompt: where the KV lies that it reads; NO_SLOT: its own.
    reads: Slots = field(default_factory=lambda: np.empty(0, np.int32))
    own: Positions = field(default_factory=lambda: np.empty(0, np.int64))  # that it computes
    held: PageIds = field(default_factory=lambda: _NO_PAGES)  # pages that it reads
    num_until_published: int = 0  # own tokens that have to be scheduled before
    is_published: bool = False

    @property
    def owned(self) -> Iterator[SegmentHash]:
        """Segments that it computes for all, once it has started."""
        runs = self.plan.runs if self.plan is not None else ()
        return (segment for run in runs for _, segment, _ in run.segments)

    @property
    def is_mirror(self) -> bool:
        """Whether it reads KV of others in place."""
        return self.plan is not None and len(self.own) < len(self.token_ids)


class Rounds:
    """Members of all rounds that wait or run; times are the caller's."""

    def __init__(
        self,
        store: KVStore,
        policy: CorrectionPolicy,
        *,
        window_s: float,
        window_share: float,
        round_wait_s: float,
        max_retained: int,
        recent_s: float,
        special_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Begin with none.

        Args:
            store: over vLLM's blocks.
            policy: what of reused segments is computed afresh.
            window_s: gap without an arrival after which a round begins.
            window_share: the longest wait, as a share of the time that a lone request takes.
            round_wait_s: a round with a name begins so long after its last request, if it is not
                full.
            max_retained: pages that may be kept for later rounds though no request holds them.
            recent_s: see `DiscoveryConfig`.
            special_ids: likewise.
        """
        self._store = store
        self._planner = Planner(store, policy, prefix=True, segments=True)
        self._arrivals: Arrivals[Member] = Arrivals(window_s, window_share, round_wait_s)
        self._max_retained = max_retained
        self._discoveries = Discoveries(DiscoveryConfig(recent_s=recent_s, special_ids=special_ids))
        self._waiting: list[Member] = []  # in the order in which they may start
        self._live: dict[str, Member] = {}  # started
        self._computing: Counter[SegmentHash] = Counter()  # segments that started members own
        self._num_rounds = 0
        self.figures = Figures()  # counts only; whoever shows them begins them anew

    # -- arriving -----------------------------------------------------------------------------

    def arrive(self, member: Member, now: float) -> None:
        """Let a request wait for others of its round."""
        self._arrivals.add(member, now)

    @property
    def num_waiting(self) -> int:
        """Members that have not started."""
        return len(self._waiting) + len(self._arrivals)

    def remove(self, request_id: str) -> Member | None:
        """Take out a member that has not started; None if there is none of that id."""
        self._arrivals.note_done(request_id)
        for member in self._waiting:
            if member.request_id == request_id:
                self._waiting.remove(member)
                return member
        return self._arrivals.remove(request_id)

    def start(self, now: float) -> Iterator[Member]:
        """Begin rounds that are due, and start members whose segments nobody is computing."""
        for members in self._arrivals.take(now):
            self._begin(members, now)
        started: list[Member] = []
        for member in self._waiting:
            if not self._has_to_wait(member):
                self._start(member)
                started.append(member)
                yield member
        if started:
            self._waiting = [member for member in self._waiting if member.plan is None]

    def _has_to_wait(self, member: Member) -> bool:
        """Whether somebody computes what a member reads, and is not put off for less than it."""
        if not any(segment in self._computing for segment in member.shared):
            return False
        return any(
            not other.is_published
            and other.priority <= member.priority
            and any(segment in member.shared for segment in other.owned)
            for other in self._live.values()
        )

    def _begin(self, members: Sequence[Member], now: float) -> None:
        """Find what the members of a round share, and in which order they start."""
        round_id = RoundId(self._num_rounds)
        self._num_rounds += 1
        prompts = self._cut(members, now)
        for member, prompt in zip(members, prompts, strict=True):
            member.round_id, member.prompt = round_id, prompt
            member.shared = frozenset(part.hash for _, part in prompt.shared_segments())
            member.in_round |= bool(member.shared)
        self.figures.rounds += sum(bool(member.shared) for member in members) > 1
        order = self._planner.order(prompts, round_id)
        for start in sorted(order, key=lambda start: members[start.index].priority):
            member = members[start.index]
            member.owns_order = start.owns_order
            self._waiting.append(member)

    def _cut(self, members: Sequence[Member], now: float) -> list[EncodedPrompt]:
        """Cut prompts where their clients say so, and where discovery finds what is shared."""
        salt = members[0].key.salt
        unsaid = [member for member in members if member.blocks is None]
        found = iter(self._discover(salt, unsaid, now) if unsaid else ())
        return [
            next(found)
            if member.blocks is None
            else build_prompt_at(member.token_ids, member.blocks, salt)
            for member in members
        ]

    def _discover(self, salt: Salt, members: Sequence[Member], now: float) -> list[EncodedPrompt]:
        hashes = [PrefixHashes(member.token_ids, salt) for member in members]
        num_known = [len(self._store.match_slots(text)) for text in hashes]
        for member, num in zip(members, num_known, strict=True):
            member.in_round = num > 0
        texts = [member.token_ids for member in members]
        found = self._discoveries.segment(salt, texts, now, num_known)
        if found is None:
            prompts = [build_prompt([(text, False)], salt) for text in texts]
        else:
            self._store.recall(found.earlier, salt)
            prompts = found.prompts
        for prompt, known in zip(prompts, hashes, strict=True):
            prompt.keep_hashes(known)
        return prompts

    # -- starting -----------------------------------------------------------------------------

    def _start(self, member: Member) -> None:
        """Plan a member, and hold what it reads."""
        assert member.prompt is not None
        rules = self._planner.rules(
            in_round=member.in_round,
            isolated=False,
            guarded=False,
            publishes=True,
            owns_order=member.owns_order,
        )
        known = self._plan(member, rules)
        if not self._leaves_room(known):
            known = self._plan(member, alone(rules))
        plan = known.plan
        self._hold(member, known)
        self._computing.update(member.owned)
        last_owned = max(
            (int(run.layout.max()) for run in plan.runs if len(run.layout)), default=-1
        )
        if last_owned >= 0:
            num_until = int(np.searchsorted(member.own, last_owned, side="right"))
        else:
            num_until = len(member.own)
        member.num_until_published = num_until
        self._live[member.request_id] = member

    def _plan(self, member: Member, rules: ReuseRules) -> KnownKV:
        assert member.prompt is not None
        plan = self._planner.plan(member.prompt, member.max_new_tokens, rules, member.round_id)
        return look_up(plan, self._store.page_size)

    def _leaves_room(self, known: KnownKV) -> bool:
        """Whether each request still fits into memory by itself, beside all that members hold.

        A preempted mirror goes on holding what it reads. So whoever comes first in vLLM's queue
        has to find room though nobody else runs, or all would wait for ever.
        """
        pool, size = self._store.pool, self._store.page_size
        num_own = [int(np.count_nonzero(known.slots == NO_SLOT))]  # of prompt and answer
        num_own += [len(other.own) + other.max_new_tokens for other in self._live.values()]
        fresh = pool.num_refs(known.pages, Holder.REQUEST) == 0
        num_held = pool.num_held(Holder.REQUEST) + int(np.count_nonzero(fresh))
        # One page is vLLM's null block.
        return num_held + -(-max(num_own) // size) <= pool.num_pages - 1

    def _hold(self, member: Member, known: KnownKV) -> None:
        store, plan = self._store, known.plan
        member.plan = plan
        member.reads = known.slots[: plan.num_prompt]
        member.own = np.flatnonzero(member.reads == NO_SLOT)
        member.held = known.pages
        store.pool.retain(known.pages, Holder.REQUEST)
        note_reuse(plan, store, member.round_id)
        figures = self.figures
        figures.mirrors += member.is_mirror
        figures.prompt_tokens += plan.num_prompt
        figures.reused_tokens += plan.num_prompt - len(member.own)
        figures.corrected_tokens += plan.num_corrected

    # -- running ------------------------------------------------------------------------------

    def wants_publishing(self, request_id: str, num_scheduled: int) -> bool:
        """Whether a request has scheduled all that others wait for, and `publish` is to be called.

        `num_scheduled` are its own tokens that are computed, or will be in the step at hand.
        """
        member = self._live.get(request_id)
        if member is None or member.is_published:
            return False
        return num_scheduled >= member.num_until_published

    def publish(self, request_id: str, num_scheduled: int, pages: Sequence[int]) -> None:
        """Publish what a member computes for others, now that its pages are known.

        Args:
            request_id: of the member.
            num_scheduled: own tokens that are computed, or will be in the step at hand.
            pages: of its own tokens, in their order.
        """
        member = self._live[request_id]
        assert member.plan is not None
        assert member.prompt is not None
        member.is_published = True
        slots = self._context(member.reads, num_scheduled, pages)
        self._store.slot_ready[slots] = True
        publish(member.plan, self._store, member.prompt.prefix_hashes, slots, member.round_id)
        self._end_computing(member)
        self._keep_within_budget()

    def end(
        self, request_id: str, answer: Sequence[int], num_computed: int, pages: Sequence[int]
    ) -> None:
        """Let a member go, and keep what it has read and said for later rounds.

        Args:
            request_id: of the member; nothing happens if there is none of that id.
            answer: token ids.
            num_computed: own tokens whose KV is there, of prompt and answer.
            pages: of its own tokens, in their order, which it still holds.
        """
        member = self._live.pop(request_id, None)
        if member is None:
            return
        self._arrivals.note_done(request_id)
        if not member.is_published:
            self._end_computing(member)
        self._discoveries.note_output(member.key.salt, member.token_ids, as_token_ids(answer))
        if member.is_published:
            assert member.plan is not None
            assert member.prompt is not None
            room = np.full(len(answer), NO_SLOT, np.int32)
            slots = self._context(np.concatenate([member.reads, room]), num_computed, pages)
            text = member.prompt.prefix_hashes.extended(answer)
            self._store.slot_ready[slots] = True
            self._store.publish_prefix(text, slots, member.plan.num_exact)
        self._store.pool.release(member.held, Holder.REQUEST)
        self._keep_within_budget()

    def let_go(self) -> None:
        """Let all members go that have started, and keep nothing of what they compute.

        Whoever waits for one of them computes in its place.
        """
        for member in self._live.values():
            self._arrivals.note_done(member.request_id)
            if not member.is_published:
                self._end_computing(member)
            self._store.pool.release(member.held, Holder.REQUEST)
        self._live.clear()

    def _end_computing(self, member: Member) -> None:
        self._computing.subtract(member.owned)
        self._computing = +self._computing

    def _context(self, reads: Slots, num_computed: int, pages: Sequence[int]) -> Slots:
        """Slots of a context up to its first token whose KV is not computed.

        `reads` are those of prompt and answer, with NO_SLOT for its own tokens.
        """
        size = self._store.page_size
        own = np.flatnonzero(reads == NO_SLOT)
        num_computed = min(num_computed, len(own), len(pages) * size)
        tokens = np.arange(num_computed)
        slots = reads.copy()
        slots[own[:num_computed]] = (
            np.asarray(pages, np.int64)[tokens // size] * size + tokens % size
        )
        return slots if num_computed == len(own) else slots[: own[num_computed]]

    # -- room ---------------------------------------------------------------------------------

    def give_up(self, count: int) -> bool:
        """Forget KV that no request holds, the least useful first; say if `count` pages came free.

        Called when vLLM has too few blocks.
        """
        return self._store.make_room(self._store.pool.num_free + count)

    def _keep_within_budget(self) -> None:
        self._store.make_room(self._store.pool.num_pages - self._max_retained)

    def forget(self) -> None:
        """Forget all KV but what requests hold, as when vLLM's weights or its cache change."""
        self._store.clear()

    def check_integrity(self) -> None:
        """Assert that counts, indexes and members agree."""
        self._store.check_integrity(member.held for member in self._live.values())
        computing: Counter[SegmentHash] = Counter()
        for member in self._live.values():
            if not member.is_published:
                computing.update(member.owned)
        assert computing == self._computing
