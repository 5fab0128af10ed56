"""Exact motion of planes: closed forms, and a naive ray caster as reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from poodle_lightning.data.synthetic import Street
from poodle_lightning.data.synthetic.motion import motion
from poodle_lightning.data.synthetic.outlines import covers
from poodle_lightning.data.synthetic.patches import AHEAD, RIGHT, UP, Look, Motion, PatchList, Pose
from poodle_lightning.data.synthetic.plan import turned
from poodle_lightning.data.synthetic.raster import FAR, NEAR, rasterise

HEIGHT, WIDTH, FOCAL = 24, 40, 30.0
K = np.array([[FOCAL, 0, (WIDTH - 1) / 2], [0, FOCAL, (HEIGHT - 1) / 2], [0, 0, 1]])


def pose(x=0.0, y=1.5, z=0.0, yaw=0.0, pitch=0.0, roll=0.0, time=0.0):
    return Pose(time, z, np.array([x, y, z]), turned(yaw, pitch, roll), K)


def raster(patches, camera, supersample=2):
    return rasterise(patches.array(), camera, (0, 0, WIDTH, HEIGHT), supersample)


def wall(depth, moving=None):
    patches = PatchList(1000)
    if moving is not None:
        patches.motion = moving
    patches.add(2, (-500.0, -500.0, depth), (RIGHT, UP), (1000.0, 1000.0), Look(((0.5, 0.5, 0.5),)))
    return patches


def grid():
    return np.meshgrid(np.arange(WIDTH, dtype=float), np.arange(HEIGHT, dtype=float))


def applied(homography):
    """Displacement of all pixels under a homography, by the textbook."""
    x, y = grid()
    point = np.einsum("ij,jhw->ihw", homography, np.stack([x, y, np.ones_like(x)]))
    return np.stack([point[0] / point[2] - x, point[1] / point[2] - y]), point[2]


@pytest.mark.parametrize("supersample", [1, 2, 3])
def test_a_wall_under_sideways_motion_moves_by_focal_times_way_over_depth(supersample):
    patches = wall(8.0)
    flow, visible = motion(
        raster(patches, pose(), supersample), raster(patches, pose(x=0.4, y=1.4), supersample)
    )
    np.testing.assert_allclose(flow[0], -FOCAL * 0.4 / 8.0, atol=1e-5)
    np.testing.assert_allclose(flow[1], -FOCAL * 0.1 / 8.0, atol=1e-5)  # the camera sinks, the image rises
    x, y = grid()
    inside = (x - 1.5 >= -0.5) & (y - 0.375 >= -0.5)
    np.testing.assert_array_equal(visible, inside)


def test_a_wall_under_forward_motion_expands_about_the_centre():
    patches = wall(10.0)
    flow, _ = motion(raster(patches, pose()), raster(patches, pose(z=2.0)))
    x, y = grid()
    np.testing.assert_allclose(flow[0], (x - K[0, 2]) * 2.0 / (10.0 - 2.0), atol=1e-5)
    np.testing.assert_allclose(flow[1], (y - K[1, 2]) * 2.0 / (10.0 - 2.0), atol=1e-5)


def test_a_wall_that_moves_by_itself_counts_like_the_camera():
    patches = wall(10.0, Motion(velocity=(1.0, 0.0, -3.0), sway=(0.5, 0.0, 0.0), beat=(2.0, 0.3)))
    flow, _ = motion(raster(patches, pose()), raster(patches, pose(time=0.5)))
    x, _ = grid()
    sideways = 0.5 + 0.5 * (math.cos(1.3) - math.cos(0.3))
    here = (x - K[0, 2]) * 10.0 / FOCAL
    np.testing.assert_allclose(flow[0], K[0, 2] + FOCAL * (here + sideways) / 8.5 - x, atol=1e-4)


def test_the_ground_follows_the_homography_of_a_plane():
    patches = PatchList(1)
    patches.add(0, (-900.0, 0.0, -900.0), (RIGHT, AHEAD), (1800.0, 1800.0), Look(((0.4, 0.4, 0.4),)))
    first, second = pose(), pose(x=0.3, y=1.6, z=1.2, yaw=0.05, pitch=-0.03, roll=0.02)
    flow, _ = motion(raster(patches, first), raster(patches, second))
    # plane n·X = d in the first camera: n points down, d is the camera's height (Hartley and Zisserman 13.1)
    turn = second.rotation @ first.rotation.T
    shift = -second.rotation @ (second.centre - first.centre)
    expected, ahead = applied(K @ (turn + np.outer(shift, [0.0, 1.0, 0.0]) / 1.5) @ np.linalg.inv(K))
    on_ground = raster(patches, first).centres(raster(patches, first).seen) == 0
    assert on_ground.mean() > 0.3
    np.testing.assert_allclose(
        flow[:, on_ground & (ahead > 0.3)], expected[:, on_ground & (ahead > 0.3)], atol=1e-3
    )


def test_the_sky_follows_the_rotation_only():
    patches = wall(-5.0)  # behind the camera
    first, second = pose(), pose(x=3.0, z=5.0, yaw=0.1, pitch=0.05, roll=-0.04)
    flow, visible = motion(raster(patches, first), raster(patches, second))
    expected, _ = applied(K @ second.rotation @ first.rotation.T @ np.linalg.inv(K))
    np.testing.assert_allclose(flow, expected, atol=1e-4)
    x, y = grid()
    inside = (np.abs(x + expected[0] - K[0, 2]) < WIDTH / 2) & (
        np.abs(y + expected[1] - K[1, 2]) < HEIGHT / 2
    )
    np.testing.assert_array_equal(visible, inside)


def test_yaw_is_to_the_right_and_pitch_is_up():
    point = np.array([0.0, 0.0, 1.0])  # straight ahead
    assert (turned(0.1, 0.0, 0.0) @ point)[0] < 0  # looking right, it appears at the left
    assert (turned(0.0, 0.1, 0.0) @ point)[1] > 0  # looking up, it appears below


def test_a_swinging_patch_turns_about_its_hinge():
    patches = PatchList(1)
    swing = ((0.4, 2.0, 0.5), RIGHT)
    patches.add(
        11, (-20.0, 1.5, 6.0), (RIGHT, (0.0, -1.0, 0.0)), (40.0, 1.0), Look(((1.0, 0.0, 0.0),)), swing=swing
    )
    first, second = pose(time=0.0), pose(time=0.7)
    seen = raster(patches, first)
    flow, _ = motion(seen, raster(patches, second))
    _, y = grid()
    angles = [0.4 * math.sin(0.5), 0.4 * math.sin(2.0 * 0.7 + 0.5)]
    on = seen.centres(seen.seen) == 0
    assert on.sum() > 40
    # a point at distance r below the hinge: (y, z) = (−r cos, 6 − r sin) about it, y up
    ratio = (y - K[1, 2]) / FOCAL
    r = ratio * 6.0 / (math.cos(angles[0]) + ratio * math.sin(angles[0]))
    target = K[1, 2] + FOCAL * r * math.cos(angles[1]) / (6.0 - r * math.sin(angles[1]))
    np.testing.assert_allclose((flow[1] + y)[on], target[on], atol=1e-4)


def nearest_hits(patches, camera, x, y, ignore=None):
    """Depth of the nearest patch at pixels, float64, one patch after the other: rays and planes."""
    rays = np.stack(
        [(x - K_of(camera)[0, 2]) / K_of(camera)[0, 0], (y - K_of(camera)[1, 2]) / K_of(camera)[0, 0]], 1
    )
    rays = np.concatenate([rays, np.ones((len(x), 1))], 1) @ camera.rotation
    best, number = np.full(len(x), np.inf), np.full(len(x), -1)
    for n, patch in enumerate(patches):
        origin, u, v = world(patch, camera)
        normal = np.cross(u, v)
        with np.errstate(all="ignore"):
            depth = ((origin - camera.centre) @ normal) / (rays @ normal)
        hit = camera.centre + rays * depth[:, None] - origin
        a, b = hit @ u, hit @ v
        with np.errstate(invalid="ignore"):
            on = (
                (depth > NEAR)
                & (depth < FAR)
                & (a >= 0)
                & (b >= 0)
                & (a <= patch["size"][0])
                & (b <= patch["size"][1])
            )
        at = np.flatnonzero(on)
        if len(at) == 0:
            continue
        size, form = patch["size"].astype(np.float32), patch["form"]
        at = at[covers(int(patch["outline"]), a[at].astype(np.float32), b[at].astype(np.float32), size, form)]
        if ignore is not None:
            at = at[ignore[at] != patch["uid"]]
        at = at[depth[at] < best[at]]
        best[at], number[at] = depth[at], n
    return best, number


def K_of(camera):
    return camera.intrinsics


def world(patch, camera):
    """Where a patch is, written out for one patch."""
    time = camera.time
    origin = patch["origin"] + patch["velocity"] * time
    origin = origin + patch["sway"] * math.cos(patch["beat"][0] * time + patch["beat"][1])
    origin = origin + np.array([0.0, 0.0, patch["follow"] * camera.way])
    u, v = patch["u"], patch["v"]
    amplitude, rate, phase = patch["swing"]
    if amplitude:
        angle, (kx, ky, kz) = amplitude * math.sin(rate * time + phase), patch["hinge"]
        cross = np.array([[0, -kz, ky], [kz, 0, -kx], [-ky, kx, 0]])
        turn = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
        u, v = turn @ u, turn @ v
    return origin, u, v


@pytest.fixture(scope="module", params=[("easy", 3), ("hard", 8)])
def street(request):
    difficulty, seed = request.param
    return Street(seed, (40, 80), difficulty)


def test_depth_agrees_with_a_naive_ray_caster(street):
    frame = street.frame(1.3)
    camera = street.layout.plan.pose(1.3, street.size)
    x, y = (c.reshape(-1).astype(float) for c in np.meshgrid(np.arange(80), np.arange(40)))
    depth, number = nearest_hits(street.layout.patches(1.3), camera, x, y)
    close = np.isclose(frame.depth.reshape(-1), depth, rtol=1e-3)
    assert close.mean() > 0.998  # float32 may decide differently on an edge
    labels = street.layout.patches(1.3)["label"][number]
    solid = np.isfinite(depth)
    assert (labels == frame.labels.reshape(-1))[solid].mean() > 0.998


def test_visibility_is_the_depth_test_of_a_naive_ray_caster(street):
    flow, visible = street.flow(1.0, 1.5)
    frame, camera = street.frame(1.0), street.layout.plan.pose(1.5, street.size)
    x, y = (c.reshape(-1).astype(float) for c in np.meshgrid(np.arange(80), np.arange(40)))
    here = street.layout.plan.pose(1.0, street.size)
    patches = street.layout.patches(1.0)
    _, number = nearest_hits(patches, here, x, y)
    known = np.isfinite(frame.depth.reshape(-1))
    tx, ty = x + flow[0].reshape(-1), y + flow[1].reshape(-1)
    inside = (tx >= -0.5) & (tx < 79.5) & (ty >= -0.5) & (ty < 39.5)
    at = np.flatnonzero(inside & known)
    # depth of the followed point in the second camera, from its place on its own patch
    own = np.empty(len(at))
    for k, i in enumerate(at):
        patch = patches[number[i]]
        origin, u, v = world(patch, here)
        ray = np.array([x[i], y[i], 1.0]) @ np.linalg.inv(here.intrinsics).T @ here.rotation
        hit = here.centre + ray * frame.depth.reshape(-1)[i] - origin
        there = world(patch, camera)
        point = there[0] + (hit @ u) * there[1] + (hit @ v) * there[2]
        own[k] = (camera.rotation @ (point - camera.centre))[2]
    other, _ = nearest_hits(
        street.layout.patches(1.5), camera, tx[at], ty[at], ignore=patches["uid"][number[at]]
    )
    expected = (own > NEAR) & (own < FAR) & ~(other < own * (1 - 1e-3))
    agree = visible.reshape(-1)[at] == expected
    assert 0.02 < (~expected).mean() < 0.6
    assert agree.mean() > 0.99
    assert not visible.reshape(-1)[~inside].any()
