#!/bin/sh
# Build stages of the images: what ends up in the virtual environment /opt/shelora of one role.
#   install.sh packages ROLE      the locked packages of requirements/ROLE.txt, in /opt/shelora
#   install.sh product PART...    our own code, of services/ and shelora/he only the named parts, in /opt/product: a layer of its own,
#                                 so that a new version of ours does not send the packages again
# For the agent, TORCH=cpu takes the CPU build of the locked torch where the index (or TORCH_INDEX, an extra one) offers it, which
# saves about 4 GB, and else the standard wheel; TORCH=cuda always takes the standard wheel with its CUDA libraries.
set -eu

venv=/opt/shelora
uv=/opt/uv/bin/uv

bootstrap() {
  python -m venv /opt/uv
  /opt/uv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
}

install() {
  "$uv" pip install --quiet --no-cache --compile-bytecode --python "$venv/bin/python" "$@"
}

# Prints a locked requirements file without the packages whose names match. An entry is a line that starts with a name, and the
# lines after it.
without() { # without PATTERN FILE
  awk -v name="^($1)==" '/^[A-Za-z0-9]/ { keep = $0 !~ name } keep' "$2"
}

cpu_torch() { # cpu_torch VERSION: fetches the CPU build into /tmp/torch; fails when no index has it
  /opt/uv/bin/python -m pip download --quiet --no-cache-dir --disable-pip-version-check --no-deps --dest /tmp/torch \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch==$1+cpu" 2>/dev/null
}

packages() {
  locked=requirements/$1.txt
  version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$locked")
  bootstrap
  python -m venv --without-pip "$venv"
  # What only builds is gone before the layer is written; a second layer of several gigabytes would be written otherwise.
  trap 'rm -rf /opt/uv /tmp/torch /tmp/locked.txt' EXIT
  if [ -z "$version" ] || [ "${TORCH:-cpu}" = cuda ]; then
    install --require-hashes -r "$locked"
  elif cpu_torch "$version"; then
    echo "install: CPU build of torch $version"
    without 'torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+' "$locked" >/tmp/locked.txt
    install --require-hashes -r /tmp/locked.txt
    install --no-deps /tmp/torch/*.whl
  else
    echo "install: no CPU build of torch $version is offered; the standard one, without triton, which only GPUs use"
    without triton "$locked" >/tmp/locked.txt
    install --require-hashes --no-deps -r /tmp/locked.txt
  fi
}

product() {
  bootstrap
  for part in services/*/ shelora/he/secret/; do
    part=${part%/}
    case " $* services/common " in
      *" $part "*) ;;
      *) rm -rf "$part" ;;
    esac
  done
  PATH=/opt/uv/bin:$PATH python -m pip wheel --quiet --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir /tmp/wheel .
  install --no-deps --prefix /opt/product /tmp/wheel/*.whl
  for command in /opt/product/bin/shelora*; do
    folder=$(sed -n 's/^from services\.\([a-z_]*\).* import .*/\1/p' "$command" | head -1)
    [ -d "services/$folder" ] || rm "$command"
  done
}

step=$1
shift
"$step" "$@"
