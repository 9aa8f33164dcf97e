"""What tenants have used of their quotas: a token bucket for requests and one for tokens. Pure: times are arguments.

A bucket holds a minute's quota, is full at first, and fills evenly. Prompts are charged when they are accepted and
outputs as they come, so the tokens' bucket may go below zero; it then takes as long to be of use again.
"""

from collections import OrderedDict
from dataclasses import dataclass

from ..common.messages import Quota

MINUTE_S = 60.0
MAX_TENANTS = 4096  # remembered; those that came last
ROUNDING = 1e-6  # who waits as long as it was told to is not refused for the last bit of a float


@dataclass(slots=True)
class Account:
    """What is missing from the buckets of a tenant. Nothing is missing from those of an unknown one."""

    at: float
    requests: float = 0.0
    tokens: float = 0.0

    def fill(self, quota: Quota, now: float) -> None:
        minutes = max(0.0, now - self.at) / MINUTE_S
        self.requests = max(0.0, self.requests - quota.requests * minutes)
        self.tokens = max(0.0, self.tokens - quota.tokens * minutes)
        self.at = now


@dataclass(frozen=True, slots=True)
class Refusal:
    why: str
    retry_after_s: float


class Quotas:
    """Accounts by tenant. A quota comes with every request, so it may change between two."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[str, Account] = OrderedDict()

    def admit(self, tenant: str, quota: Quota, num_tokens: int, now: float) -> Refusal | None:
        """Charge a request with a prompt of `num_tokens`, or charge nothing and say when to come again."""
        if quota.requests <= 0 and quota.tokens <= 0:
            return None
        account = self._account(tenant, quota, now)
        requests_s = _wait_s(account.requests, quota.requests)
        tokens_s = _wait_s(account.tokens, quota.tokens)
        if tokens_s or requests_s:
            scarce = f"{quota.tokens} tokens" if tokens_s > requests_s else f"{quota.requests} requests"
            return Refusal(f"the quota of {scarce} per minute is used up", max(tokens_s, requests_s))
        account.requests += 1
        account.tokens += num_tokens
        return None

    def charge(self, tenant: str, quota: Quota, num_tokens: int, now: float) -> None:
        """Tokens of an output."""
        if quota.tokens > 0:
            self._account(tenant, quota, now).tokens += num_tokens

    def __len__(self) -> int:
        return len(self._accounts)

    def _account(self, tenant: str, quota: Quota, now: float) -> Account:
        account = self._accounts.setdefault(tenant, Account(now))
        self._accounts.move_to_end(tenant)
        account.fill(quota, now)
        if len(self._accounts) > MAX_TENANTS:
            self._accounts.popitem(last=False)
        return account


def _wait_s(missing: float, quota: int) -> float:
    """Seconds until a bucket has something left; 0 when it has, or when there is no limit."""
    lacking = missing + 1 - quota
    return lacking * MINUTE_S / quota if quota > 0 and lacking > ROUNDING else 0.0
