"""Pages that are kept for each tenant, and plans of requests that fit beside them."""

from tokendance.collector.plan import RequestPlan, ReuseRules
from tokendance.collector.planner import Planner, alone
from tokendance.engine.allocator import Allocator
from tokendance.engine.request import Request
from tokendance.engine.tenants import Tenant, TenantRules, Tenants
from tokendance.errors import BudgetError, ConfigError
from tokendance.rounds.segments import Salt
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder
from tokendance.units import format_bytes


class Reservations:
    """What of the KV memory is whose. It changes nothing in the store.

    Attributes:
        rules: what is kept for each tenant.
        num_reserved: pages that are reserved for each.
    """

    def __init__(
        self,
        store: KVStore,
        planner: Planner,
        allocator: Allocator,
        tenants: Tenants,
        kv_bytes_per_token: int,
    ) -> None:
        """Reserve nothing yet; a token's KV takes so many bytes, for messages."""
        self._store = store
        self._planner = planner
        self._allocator = allocator
        self._tenants = tenants
        self._kv_bytes_per_token = kv_bytes_per_token
        self.set_rules(TenantRules())

    def set_rules(self, rules: TenantRules) -> None:
        """Say what is kept for each tenant, before there is any request.

        Raises:
            ConfigError: if there is no page for each.
        """
        num_pages = self._store.pool.num_pages
        self.rules = rules
        self.num_reserved = rules.pages_for_each(num_pages)
        self._num_for_one = num_pages - (rules.num_tenants - 1) * self.num_reserved
        if self._num_for_one < self.num_reserved:
            raise ConfigError(
                f"The KV budget of {self._kv_bytes(num_pages)} has {num_pages} pages, and each of "
                f"{rules.num_tenants} API keys has some of its own. Raise kv_budget "
                "(--kv-budget), or reserve none (--reserved-kv 0)."
            )

    def num_kept(self, tenant: Tenant, *, only_own: bool) -> int:
        """Pages that the next request of a tenant has to leave alone.

        Args:
            tenant: whose request it is.
            only_own: leave it nothing but what is reserved for it.
        """
        num_kept = self._tenants.num_kept(tenant, self.rules, self.num_reserved)
        if only_own:
            pool = self._store.pool
            num_left = pool.num_pages - pool.num_held(Holder.REQUEST)
            num_kept = max(num_kept, num_left - max(0, self.num_reserved - tenant.num_pages))
        return num_kept

    def num_kept_from_disk(self, salt: Salt) -> int:
        """Pages that have to be left alone when KV of a tenant is read from disk."""
        tenant = self._tenants.find(salt)
        return self._tenants.num_kept(tenant, self.rules, self.num_reserved)

    def fitting_plan(self, request: Request, num_kept: int) -> RequestPlan | None:
        """The plan of a request, if there is room for it beside `num_kept` pages now.

        Raises:
            BudgetError: if there never will be.
        """
        rules = self._rules(request)
        plan = self._plan(request, rules)
        if self._allocator.can_allocate(plan, num_kept):
            return plan
        if plan.lent is not None:
            # Texts of others that it need not read are in the way.
            request.lenders = None
            return self.fitting_plan(request, num_kept)
        if self._tenants.of(request).num_running:
            return None
        # Reading KV of others keeps their pages; computing all of it may need fewer.
        plan = self._plan(request, alone(rules))
        if self._allocator.can_allocate(plan, num_kept):
            return plan
        num_pages = self._allocator.num_pages(plan)
        if num_pages > self._num_for_one:
            raise self._too_large(request, num_pages)
        return None

    def _rules(self, request: Request) -> ReuseRules:
        return self._planner.rules(
            in_round=request.in_round,
            isolated=request.isolated,
            publishes=request.publishes,
            owns_order=request.owns_order,
            guarded=request.guarded,
            lenders=request.lenders,
        )

    def _plan(self, request: Request, rules: ReuseRules) -> RequestPlan:
        return self._planner.plan(request.prompt, request.max_new_tokens, rules, request.round_id)

    def _too_large(self, request: Request, num_pages: int) -> BudgetError:
        budget = f"the budget is {self._kv_bytes(self._store.pool.num_pages)}"
        what_to_do = "Raise kv_budget (--kv-budget), or lower max_tokens."
        if self._num_for_one < self._store.pool.num_pages:
            budget += f", of which one tenant may have {self._kv_bytes(self._num_for_one)}"
            what_to_do = "Lower max_tokens, raise --kv-budget, or lower --reserved-kv."
        return BudgetError(
            f"The request{request.whose} needs {self._kv_bytes(num_pages)} of KV "
            f"for {len(request.prompt)} prompt tokens and up to {request.max_new_tokens} more, and "
            f"{budget}. {what_to_do}"
        )

    def _kv_bytes(self, num_pages: int) -> str:
        return format_bytes(num_pages * self._store.page_size * self._kv_bytes_per_token)
