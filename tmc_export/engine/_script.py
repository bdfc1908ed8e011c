"""The fixed part of build_on_device.sh; `on_device.py` fills in the bundle's subgraphs.

`@NAME@` marks what is filled in. Plain bash, so that it can be read before it is run.
"""

from __future__ import annotations

__all__ = ["FOOT", "HEAD"]

HEAD = r"""#!/usr/bin/env bash
# Builds this bundle's TensorRT engines on the device they will run on: @DEVICE@, TensorRT @TENSORRT@.
# Start it again after an interruption: engines that are complete and still valid are kept.
#
# Environment:
#   TMC_EXPORT_TRTEXEC=PATH      trtexec to use (otherwise: PATH, then /usr/src/tensorrt/bin)
#   TMC_EXPORT_ONLY_TRTEXEC=1    do not use an installed tmc-export
#   TMC_EXPORT_IGNORE_MEMORY=1   do not refuse when memory looks too small
#   TMC_EXPORT_MEMINFO=PATH      read free memory from here instead of /proc/meminfo
set -euo pipefail
cd "$(dirname "$0")"

MEMINFO="${TMC_EXPORT_MEMINFO:-/proc/meminfo}"
FAILED=()
RECORDS=()

die() { # status message
  echo "build_on_device: $2" >&2
  exit "$1"
}

need_memory() { # name kib
  local free
  free="$(awk '/^MemAvailable:/ {print $2}' "$MEMINFO")"
  [ -n "$free" ] || die 5 "cannot read the free memory from $MEMINFO"
  if [ "$2" -gt "$free" ] && [ "${TMC_EXPORT_IGNORE_MEMORY:-0}" != 1 ]; then
    echo "close the desktop and other programs; or add swap and set TMC_EXPORT_IGNORE_MEMORY=1; or cut the decoder into more blocks" >&2
    die 5 "$1 needs about $(($2 / 1024)) MiB of memory to build and $((free / 1024)) MiB are free"
  fi
}

need_disk() { # name kib
  local free
  free="$(df -Pk engines | awk 'NR == 2 {print $4}')"
  [ "$2" -le "$free" ] || die 5 "$1 needs about $(($2 / 1024)) MiB of disk and $((free / 1024)) MiB are free here; free some space"
}

stamp_of() { # name key
  echo "$2 tensorrt=$VERSION"
}

is_built() { # name key
  [ -s "engines/$1.tensorrt.engine" ] && [ "$(cat "engines/$1.tensorrt.stamp" 2>/dev/null)" = "$(stamp_of "$1" "$2")" ]
}

link_weights() { # weight files, relative to engines/
  local file
  for file in "$@"; do
    [ -s "engines/$file" ] || die 4 "the weight file engines/$file is missing; copy the whole bundle"
    case "$file" in
      ../*) ln -sf "$file" "engines/$(basename "$file")" && LINKS+=("engines/$(basename "$file")") ;;
    esac
  done
}

LINKS=()
unlink_weights() {
  local link
  for link in ${LINKS[@]+"${LINKS[@]}"}; do
    if [ -L "$link" ]; then rm -f "$link"; fi
  done
  LINKS=()
}
trap unlink_weights EXIT

build() { # name key memory_kib disk_kib graph profiles [trtexec options]
  local name="$1" key="$2" memory="$3" disk="$4" graph="$5" profiles="$6" out="engines/$1.tensorrt.engine" status=0
  shift 6
  if is_built "$name" "$key"; then
    echo "build_on_device: $name is built already"
  else
    need_memory "$name" "$memory"
    need_disk "$name" "$disk"
    echo "build_on_device: building $name (about $((memory / 1024)) MiB of memory)"
    rm -f "$out" "engines/$name.tensorrt.stamp"
    "$TRTEXEC" "--onnx=$graph" "--saveEngine=$out.partial" ${TYPED[@]+"${TYPED[@]}"} --skipInference @OPTIONS@ \
      "--exportLayerInfo=$out.layers.trtexec.json" "$@" >"engines/$name.tensorrt.log" 2>&1 || status=$?
    if [ "$status" -ne 0 ] || [ ! -s "$out.partial" ]; then
      rm -f "$out.partial"
      echo "build_on_device: $name failed with status $status; the last lines of engines/$name.tensorrt.log:" >&2
      tail -n 5 "engines/$name.tensorrt.log" >&2 || true
      [ "$status" -ne 137 ] || die 5 "$name was killed, most likely for want of memory"
      FAILED+=("$name")
      return 0
    fi
    mv "$out.partial" "$out"
    stamp_of "$name" "$key" >"engines/$name.tensorrt.stamp"
  fi
  RECORDS+=("$(record "$name" "$key" "$profiles")")
}

record() { # name key profiles
  local out="engines/$1.tensorrt.engine" capability
  capability="$(sed -n 's/.*Compute Capability: \([0-9]*\)\.\([0-9]*\).*/"SM\1\2"/p' "engines/$1.tensorrt.log" 2>/dev/null | head -n 1)"
  printf '{"name": "%s", "flavour": "tensorrt", "version": "%s", "capabilities": [%s], ' "$1" "$VERSION" "$capability"
  printf '"file": "%s", "bytes": %s, "sha256": "%s", "key": "%s", "profiles": %s}' \
    "$out" "$(wc -c <"$out" | tr -d ' ')" "$(sha256sum "$out" | cut -d ' ' -f 1)" "$2" "$3"
}

write_records() {
  local index last
  last=$((${#RECORDS[@]} - 1))
  {
    printf '{"schema": 1, "engines": [\n'
    for index in "${!RECORDS[@]}"; do
      if [ "$index" -lt "$last" ]; then printf ' %s,\n' "${RECORDS[$index]}"; else printf ' %s\n' "${RECORDS[$index]}"; fi
    done
    printf ']}\n'
  } >engines/engines.json.partial
  mv engines/engines.json.partial engines/engines.json
}

mkdir -p engines
need_memory "the largest engine (@LARGEST@)" @LARGEST_KIB@
need_disk "this bundle" @DISK_KIB@

# An installed tmc-export does the same with better messages.
if [ "${TMC_EXPORT_ONLY_TRTEXEC:-0}" != 1 ]; then
  if command -v tmc-export >/dev/null 2>&1; then
    exec tmc-export engine . --runtime tensorrt @ENGINE_OPTIONS@
  elif command -v python3 >/dev/null 2>&1 && python3 -c 'import tensorrt, tmc_export.cli' >/dev/null 2>&1; then
    exec python3 -m tmc_export.cli engine . --runtime tensorrt @ENGINE_OPTIONS@
  fi
fi

# One build at a time: a second one waits, and finds what the first has built. A trtexec that outlives its script holds the lock, too.
if command -v flock >/dev/null 2>&1; then
  exec 9<engines
  if ! flock -n 9; then
    echo "build_on_device: another build is at work here; waiting for its end"
    flock 9
  fi
fi

TRTEXEC="${TMC_EXPORT_TRTEXEC:-$(command -v trtexec || true)}"
[ -n "$TRTEXEC" ] || TRTEXEC=/usr/src/tensorrt/bin/trtexec
command -v "$TRTEXEC" >/dev/null 2>&1 || die 2 "trtexec is missing ($TRTEXEC); JetPack brings it: sudo apt install nvidia-jetpack"

# trtexec prints its version as [TensorRT v100300]: major, minor, patch in two digits each.
NUMBER="$("$TRTEXEC" --help 2>&1 | sed -n 's/.*TensorRT v\([0-9]\{6\}\).*/\1/p' | head -n 1 || true)"
VERSION="@TENSORRT@"
[ -z "$NUMBER" ] || VERSION="$((10#${NUMBER:0:2})).$((10#${NUMBER:2:2})).$((10#${NUMBER:4:2}))"
[ "${VERSION%%.*}" -ge 10 ] || die 3 "TensorRT $VERSION is too old; these graphs need 10.3 (JetPack 6.1) or newer"
TYPED=()
[ "${VERSION%%.*}" -ge 11 ] || TYPED=(--stronglyTyped) # TensorRT 11 has no other kind of network
"""

FOOT = r"""
[ "${#RECORDS[@]}" -eq 0 ] || write_records
if [ "${#FAILED[@]}" -gt 0 ]; then
  die 3 "not built: ${FAILED[*]}; see engines/*.tensorrt.log"
fi
echo "build_on_device: all @COUNT@ engines are in engines/ (TensorRT $VERSION)"
"""
