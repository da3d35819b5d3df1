package main

// Health checks and actions in Argo CD's own Lua engine, with the rights that scripts of the ConfigMap argocd-cm have.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/argoproj/argo-cd/gitops-engine/pkg/health"
	"github.com/argoproj/argo-cd/v3/pkg/apis/application/v1alpha1"
	"github.com/argoproj/argo-cd/v3/util/lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// luaMain is `argo lua ARGS`.
func luaMain(args []string) {
	if len(args) < 2 {
		fail(errors.New("lua test|health|action DIR [ACTION]"))
	}
	vm, err := engine(args[1])
	if err != nil {
		fail(err)
	}
	switch {
	case args[0] == "test":
		t := tests{vm: vm}
		if err := t.all(args[1]); err != nil {
			fail(err)
		}
		fmt.Printf("%d passed, %d failed\n", t.passed, t.failed)
		if t.failed > 0 || t.passed == 0 {
			os.Exit(1)
		}
	case args[0] == "health":
		err = healths(vm)
	case args[0] == "action" && len(args) == 3:
		err = act(vm, args[2])
	default:
		err = fmt.Errorf("lua %v: unknown", args)
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "lua:", err)
	os.Exit(2)
}

// engine has the scripts of a folder as if they were in argocd-cm.
func engine(dir string) (lua.VM, error) {
	overrides := map[string]v1alpha1.ResourceOverride{}
	scripts, err := filepath.Glob(filepath.Join(dir, "*", "*", "health.lua"))
	if err != nil {
		return lua.VM{}, err
	}
	for _, script := range scripts {
		kind := filepath.Dir(script)
		override := v1alpha1.ResourceOverride{}
		if override.HealthLua, err = text(script); err != nil {
			return lua.VM{}, err
		}
		if override.Actions, err = actions(filepath.Join(kind, "actions")); err != nil {
			return lua.VM{}, err
		}
		overrides[filepath.Base(filepath.Dir(kind))+"/"+filepath.Base(kind)] = override
	}
	return lua.VM{ResourceOverrides: overrides}, nil
}

func text(path string) (string, error) {
	bytes, err := os.ReadFile(path)
	return string(bytes), err
}

// actions is the value of resource.customizations.actions of one kind.
func actions(dir string) (string, error) {
	scripts, err := filepath.Glob(filepath.Join(dir, "*", "action.lua"))
	if err != nil || len(scripts) == 0 {
		return "", err
	}
	all := v1alpha1.ResourceActions{}
	if all.ActionDiscoveryLua, err = text(filepath.Join(dir, "discovery.lua")); err != nil {
		return "", err
	}
	for _, script := range scripts {
		action := v1alpha1.ResourceActionDefinition{Name: filepath.Base(filepath.Dir(script))}
		if action.ActionLua, err = text(script); err != nil {
			return "", err
		}
		all.Definitions = append(all.Definitions, action)
	}
	bytes, err := yaml.Marshal(all)
	return string(bytes), err
}

func healthOf(vm lua.VM, object *unstructured.Unstructured) (*health.HealthStatus, error) {
	script, _, err := vm.GetHealthScript(object)
	if err != nil {
		return nil, err
	}
	if script == "" {
		return nil, fmt.Errorf("no health check for %s", object.GroupVersionKind())
	}
	return vm.ExecuteHealthLua(object, script)
}

func healths(vm lua.VM) error {
	var objects []map[string]any
	if err := json.NewDecoder(os.Stdin).Decode(&objects); err != nil {
		return err
	}
	answers := []*health.HealthStatus{}
	for _, object := range objects {
		answer, err := healthOf(vm, &unstructured.Unstructured{Object: object})
		if err != nil {
			return err
		}
		answers = append(answers, answer)
	}
	return json.NewEncoder(os.Stdout).Encode(answers)
}

// act runs an action on the object on standard input, if it is offered and not disabled, and prints what becomes of the object.
func act(vm lua.VM, name string) error {
	object := &unstructured.Unstructured{}
	if err := json.NewDecoder(os.Stdin).Decode(&object.Object); err != nil {
		return err
	}
	scripts, err := vm.GetResourceActionDiscovery(object)
	if err != nil {
		return err
	}
	offered, err := vm.ExecuteResourceActionDiscovery(object, scripts)
	if err != nil {
		return err
	}
	for _, action := range offered {
		if action.Name != name || action.Disabled {
			continue
		}
		definition, err := vm.GetResourceAction(object, name)
		if err != nil {
			return err
		}
		changed, err := vm.ExecuteResourceAction(object, definition.ActionLua, nil)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(changed[0].UnstructuredObj.Object)
	}
	return fmt.Errorf("%s is not offered", name)
}

type tests struct {
	vm             lua.VM
	passed, failed int
}

// The form of health_test.yaml and action_test.yaml is Argo CD's.
type healthTests struct {
	Tests []struct {
		InputPath    string              `json:"inputPath"`
		HealthStatus health.HealthStatus `json:"healthStatus"`
	} `json:"tests"`
}

type actionTests struct {
	DiscoveryTests []struct {
		InputPath string                    `json:"inputPath"`
		Result    []v1alpha1.ResourceAction `json:"result"`
	} `json:"discoveryTests"`
	ActionTests []struct {
		Action               string `json:"action"`
		InputPath            string `json:"inputPath"`
		ExpectedOutputPath   string `json:"expectedOutputPath"`
		ExpectedErrorMessage string `json:"expectedErrorMessage"`
	} `json:"actionTests"`
}

func (t *tests) all(root string) error {
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		dir := filepath.Dir(path)
		name, _ := filepath.Rel(root, dir)
		switch filepath.Base(path) {
		case "health_test.yaml":
			var list healthTests
			if err := load(path, &list); err != nil {
				return err
			}
			for _, test := range list.Tests {
				t.say(name+" health "+test.InputPath, t.health(filepath.Join(dir, test.InputPath), test.HealthStatus))
			}
		case "action_test.yaml":
			var list actionTests
			if err := load(path, &list); err != nil {
				return err
			}
			for _, test := range list.DiscoveryTests {
				t.say(name+" discovery "+test.InputPath, t.discovery(filepath.Join(dir, test.InputPath), test.Result))
			}
			for _, test := range list.ActionTests {
				expected := ""
				if test.ExpectedOutputPath != "" {
					expected = filepath.Join(dir, test.ExpectedOutputPath)
				}
				err := t.action(test.Action, filepath.Join(dir, test.InputPath), expected, test.ExpectedErrorMessage)
				t.say(name+" "+test.Action+" "+test.InputPath, err)
			}
		}
		return nil
	})
}

func (t *tests) say(name string, err error) {
	if err == nil {
		t.passed++
		fmt.Println("ok     ", name)
		return
	}
	t.failed++
	fmt.Println("FAILED ", name+":", err)
}

func load(path string, into any) error {
	bytes, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := yaml.UnmarshalStrict(bytes, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func object(path string) (*unstructured.Unstructured, error) {
	content := map[string]any{}
	err := load(path, &content)
	return &unstructured.Unstructured{Object: content}, err
}

func (t *tests) health(path string, expected health.HealthStatus) error {
	object, err := object(path)
	if err != nil {
		return err
	}
	found, err := healthOf(t.vm, object)
	if err != nil {
		return err
	}
	return same(*found, expected)
}

func (t *tests) discovery(path string, expected []v1alpha1.ResourceAction) error {
	object, err := object(path)
	if err != nil {
		return err
	}
	scripts, err := t.vm.GetResourceActionDiscovery(object)
	if err != nil {
		return err
	}
	found, err := t.vm.ExecuteResourceActionDiscovery(object, scripts)
	if err != nil {
		return err
	}
	byName := func(list []v1alpha1.ResourceAction) map[string]v1alpha1.ResourceAction {
		names := map[string]v1alpha1.ResourceAction{}
		for _, action := range list {
			names[action.Name] = action
		}
		return names
	}
	return same(byName(found), byName(expected))
}

func (t *tests) action(name, path, expectedPath, expectedError string) error {
	source, err := object(path)
	if err != nil {
		return err
	}
	action, err := t.vm.GetResourceAction(source, name)
	if err != nil {
		return err
	}
	found, err := t.vm.ExecuteResourceAction(source, action.ActionLua, nil)
	if expectedError != "" {
		if err == nil || !strings.Contains(err.Error(), expectedError) {
			return fmt.Errorf("the error is %v, expected %q", err, expectedError)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if len(found) != 1 || found[0].K8SOperation != lua.PatchOperation {
		return fmt.Errorf("one patch is expected, not %v", found)
	}
	expected, err := object(expectedPath)
	if err != nil {
		return err
	}
	withoutTime(found[0].UnstructuredObj)
	withoutTime(expected)
	return same(found[0].UnstructuredObj.Object, expected.Object)
}

// The time of a retry is another one every time: Argo CD's own tests normalize it in the same way.
func withoutTime(object *unstructured.Unstructured) {
	annotations := object.GetAnnotations()
	if _, ok := annotations["reconcile.fluxcd.io/requestedAt"]; ok {
		annotations["reconcile.fluxcd.io/requestedAt"] = "By Argo CD at: 0001-01-01T00:00:00"
		object.SetAnnotations(annotations)
	}
}

// same compares as JSON, where a number is a number.
func same(found, expected any) error {
	generic := func(value any) (any, string, error) {
		bytes, err := json.Marshal(value)
		if err != nil {
			return nil, "", err
		}
		var plain any
		err = json.Unmarshal(bytes, &plain)
		return plain, string(bytes), err
	}
	a, textA, err := generic(found)
	if err != nil {
		return err
	}
	b, textB, err := generic(expected)
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(a, b) {
		return fmt.Errorf("\n  found    %s\n  expected %s", textA, textB)
	}
	return nil
}
