"""Two replicas in Ray Serve, and rounds of requests with and without a session: run by a test."""

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

SESSIONS, AGENTS = 12, 6


@serve.deployment(
    num_replicas=2,
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": 0},
    request_router_config=RequestRouterConfig(
        request_router_class="tokendance.integrations.ray_router.RoundRouter"
    ),
)
class Replica:
    """Says which one it is."""

    def __call__(self) -> str:
        return str(serve.get_replica_context().replica_id.unique_id)


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    handle = serve.run(Replica.bind())  # type: ignore[attr-defined]
    pending = [
        [handle.options(session_id=f"town-{index}").remote() for _ in range(AGENTS)]
        for index in range(SESSIONS)
    ]
    reached = [{answer.result() for answer in answers} for answers in pending]
    assert all(len(names) == 1 for names in reached), reached
    assert len(set().union(*reached)) == 2, reached
    alone = {handle.remote().result() for _ in range(40)}
    assert len(alone) == 2, alone
    serve.shutdown()
    ray.shutdown()
    print(f"{SESSIONS} sessions were whole")


if __name__ == "__main__":
    main()
